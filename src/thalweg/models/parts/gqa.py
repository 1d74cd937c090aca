"""Gated full attention with grouped heads: paged keys and values, a norm per head, partial rotation, an output gate."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.models.parts.part import Cost, Names, PlanContext, Step, all_reduce, product
from thalweg.models.parts.rope import RopeDims
from thalweg.weights.plan import Source, Target

HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"


@dataclass(frozen=True, slots=True)
class GqaDims:
    """`heads` query heads over `kv_heads` key and value heads of `head_dim` dims, of which `rope` rotates the first.

    Each query head has an output gate beside it. Key and value heads beyond which there are ranks are replicated.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeDims

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """in_proj has rows [q | gate] per head, then k, then v. Names: norm, q, k, v, q_norm, k_norm, out."""
        K, D, shards = self.head_dim, ctx.width, ctx.shards
        queries = shards.even(self.heads, HEADS)
        kv = shards.shared(self.kv_heads, KV_HEADS, K)
        return [
            ctx.norm(f"{ours}.in_proj.norm.weight", names["norm"], D),
            *ctx.linear(
                f"{ours}.in_proj",
                Source(names["q"], (self.heads * 2 * K, D), 0, (queries[0] * 2 * K, queries[1] * 2 * K)),
                Source(names["k"], (self.kv_heads * K, D), 0, kv),
                Source(names["v"], (self.kv_heads * K, D), 0, kv),
            ),
            ctx.norm(f"{ours}.q_norm.weight", names["q_norm"], K),
            ctx.norm(f"{ours}.k_norm.weight", names["k_norm"], K),
            *ctx.linear(
                f"{ours}.out_proj", Source(names["out"], (D, self.heads * K), 1, (queries[0] * K, queries[1] * K))
            ),
        ]

    def costs(self, width: int, step: Step) -> list[Cost]:
        """Attention counts the causal half of the new tokens."""
        H, K = step.shards.count(self.heads, HEADS), self.head_dim
        G = step.shards.shared_count(self.kv_heads, KV_HEADS)
        cache = step.sequences * (step.cached + step.new) * 2 * G * K * step.dtype_bytes
        flops = step.tokens * 4.0 * H * K * (step.cached + (step.new + 1) / 2)
        return [
            product("attention in", width * (2 * H + 2 * G) * K, step),
            Cost("attention", cache, flops),
            product("attention out", width * H * K, step),
            *all_reduce("attention's sum over ranks", width, step),
        ]
