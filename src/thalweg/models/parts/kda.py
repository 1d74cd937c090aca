"""Kimi Delta Attention: a gated delta rule with a decay per key channel (arXiv:2510.26692)."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.models.parts.part import Cost, Names, PlanContext, Step, all_reduce, product
from thalweg.weights.plan import Source, Target, concat, placed, split, whole

HEADS = "the number of KDA heads"


@dataclass(frozen=True, slots=True)
class KdaDims:
    """`heads` heads of `head_dim` key and as many value dims; decay and output gates of low rank; a short convolution
    of `taps` taps."""

    heads: int
    head_dim: int
    taps: int
    rank: int

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """in_proj [3*H*K + H + 2*rank, D] has rows q, k, v, beta, f_a, g_a; up_proj [2, H*K, rank] f_b, g_b.

        Names: norm, q, k, v, beta, f_a, g_a, f_b, g_b, q_conv, k_conv, v_conv, A_log, dt_bias, out_norm, out.
        """
        H, K, D, taps, shards = self.heads, self.head_dim, ctx.width, self.taps, ctx.shards
        heads, channels = shards.even(H, HEADS), shards.even(H, HEADS, K)
        local_H = shards.count(H, HEADS)
        qkv = [Source(names[x], (H * K, D), 0, channels) for x in "qkv"]
        low_rank = [Source(names[x], (self.rank, D)) for x in ("f_a", "g_a")]
        convs = [Source(names[f"{x}_conv"], (H * K, 1, taps), 0, channels) for x in "qkv"]
        ups = [placed(names[x], (H * K, self.rank), (i,), 0, channels) for i, x in enumerate(("f_b", "g_b"))]
        return [
            ctx.norm(f"{ours}.in_proj.norm.weight", names["norm"], ctx.width),
            *ctx.linear(f"{ours}.in_proj", *qkv, Source(names["beta"], (H, D), 0, heads), *low_rank),
            Target(f"{ours}.up_proj.weight", (2, local_H * K, self.rank), tuple(ups)),
            concat(f"{ours}.conv.weight", convs, (3 * local_H * K, taps)),
            split(
                f"{ours}.A_log", names["A_log"], (1, 1, H, 1), 2, heads, local=(local_H,), dtype="float32", init="a_log"
            ),
            split(
                f"{ours}.dt_bias",
                names["dt_bias"],
                (H * K,),
                0,
                channels,
                local=(local_H, K),
                dtype="float32",
                init="dt_bias",
            ),
            whole(f"{ours}.out_norm.weight", names["out_norm"], (K,), init="ones"),
            *ctx.linear(f"{ours}.out_proj", Source(names["out"], (D, H * K), 1, channels)),
        ]

    def costs(self, width: int, step: Step) -> list[Cost]:
        """The recurrence is counted, which chunked forms exceed; a state is read unless it begins from nothing."""
        H, K, D, R = step.shards.count(self.heads, HEADS), self.head_dim, width, self.rank
        conv = 3 * H * K * self.taps
        state = H * K * K * step.state_bytes + 3 * H * K * (self.taps - 1) * step.dtype_bytes
        moved = step.sequences * state * (2 if step.cached else 1)
        # Decay, k^T S, rank-one update and q^T S; the convolution.
        flops = step.tokens * (8 * H * K * K + 2 * conv)
        return [
            product("KDA in", D * (3 * H * K + H + 2 * R), step),
            product("KDA up", 2 * R * H * K, step),
            Cost("KDA mixer", conv * step.dtype_bytes + moved, flops),
            product("KDA out", D * H * K, step),
            *all_reduce("KDA sum over ranks", D, step),
        ]
