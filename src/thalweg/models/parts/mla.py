"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), with rotated positions or without."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from thalweg.config.hf import ConfigReader
from thalweg.models.parts.part import MAX_DIM, Cost, Names, PlanContext, Step, all_reduce, product
from thalweg.models.parts.rope import RopeDims, read_mla_rope
from thalweg.weights.plan import Source, Target

HEADS = "num_attention_heads"
_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, slots=True)
class MlaDims:
    """`heads` query heads of `nope` + `rope` dims against one latent of `rank` values per token. The `rope` dims of the
    key are shared by all heads and cached beside the latent. `rotation` says how they are rotated; without one they are
    not (NoPE). Queries come from the input, or through a normed projection of `q_rank` values (rotated ones only)."""

    heads: int
    rank: int
    nope: int
    rope: int
    value: int
    q_rank: int | None = None
    rotation: RopeDims | None = None

    @property
    def head_dim(self) -> int:
        return self.nope + self.rope

    @property
    def latent(self) -> int:
        """Values cached per token: the latent and the shared part of the key."""
        return self.rank + self.rope

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        yarn = None if self.rotation is None else self.rotation.yarn
        return (1.0 if yarn is None else yarn.score_factor) / math.sqrt(self.head_dim)

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """in_proj has rows q, then latent and shared key; queries of low rank have all of q_a on every rank, and q_b
        split. kv_b_proj is [H, nope + value, rank], a matrix per head whose halves go into queries and outputs apart:
        it is kept in the model's dtype, whatever the checkpoint stores it in.

        Names: norm, q, kv_a, kv_norm, kv_b, out; q_a, q_norm and q_b in place of q for queries of low rank.
        """
        H, D, up, shards = self.heads, ctx.width, self.nope + self.value, ctx.shards

        def heads(dims: int) -> tuple[int, int]:
            return shards.even(H, HEADS, dims)

        local = (shards.count(H, HEADS), up, self.rank)

        def queries(name: str, columns: int) -> Source:
            return Source(names[name], (H * self.head_dim, columns), 0, heads(self.head_dim))

        low = self.q_rank
        first = queries("q", D) if low is None else Source(names["q_a"], (low, D))
        targets = [
            ctx.norm(f"{ours}.in_proj.norm.weight", names["norm"], D),
            *ctx.linear(f"{ours}.in_proj", first, Source(names["kv_a"], (self.latent, D))),
            ctx.norm(f"{ours}.kv_norm.weight", names["kv_norm"], self.rank),
            ctx.widened(f"{ours}.kv_b_proj.weight", local, Source(names["kv_b"], (H * up, self.rank), 0, heads(up))),
            *ctx.linear(f"{ours}.out_proj", Source(names["out"], (D, H * self.value), 1, heads(self.value))),
        ]
        if low is not None:
            targets.append(ctx.norm(f"{ours}.q_norm.weight", names["q_norm"], low))
            targets += ctx.linear(f"{ours}.q_b_proj", queries("q_b", low))
        return targets

    def costs(self, width: int, step: Step) -> list[Cost]:
        """A single new token attends in the latent space. More of them expand keys and values, once for every token
        that they attend to, and count the causal half."""
        H, D = step.shards.count(self.heads, HEADS), width
        up = H * (self.nope + self.value) * self.rank
        if step.new == 1:
            rows, flops = step.tokens, step.tokens * 2.0 * H * (self.latent + self.rank) * step.cached
        else:
            rows = step.sequences * (step.cached + step.new)
            flops = step.tokens * 2.0 * H * (self.head_dim + self.value) * (step.cached + (step.new + 1) / 2)
        cache = step.sequences * (step.cached + step.new) * self.latent * step.dtype_bytes
        low = self.q_rank
        return [
            product("MLA in", D * ((H * self.head_dim if low is None else low) + self.latent), step),
            *([] if low is None else [product("MLA queries", low * H * self.head_dim, step)]),
            Cost("MLA attention", up * step.dtype_bytes + cache, 2 * up * rows + flops),
            product("MLA out", D * H * self.value, step),
            *all_reduce("MLA sum over ranks", D, step),
        ]


def read_mla(reader: ConfigReader, *, needed: bool) -> MlaDims | None:
    """From the keys that DeepSeek's layout has, its rotation and low-rank queries left to `read_rotated_mla`. None, the
    keys passed over, if no layer needs it."""
    if not needed:
        reader.skip("num_attention_heads", "num_key_value_heads", "qk_head_dim", *_KEYS)
        return None
    heads, rank, nope, rope, value = (reader.get_int(key, low=1, high=MAX_DIM) for key in (HEADS, *_KEYS))
    # The latent is expanded for every query head; a smaller number would mean grouped heads, of which MLA has none.
    reader.agree("num_key_value_heads", heads)
    reader.agree("qk_head_dim", nope + rope)
    return MlaDims(heads, rank, nope, rope, value)


def read_rotated_mla(reader: ConfigReader) -> MlaDims:
    """With rotated positions, and queries of low rank if q_lora_rank says so."""
    dims = read_mla(reader, needed=True)
    assert dims is not None
    q_rank = reader.get_int("q_lora_rank", None, low=1, high=MAX_DIM)
    return replace(dims, q_rank=q_rank, rotation=read_mla_rope(reader, dims.rope))
