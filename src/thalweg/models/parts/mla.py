"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), so far without rotated positions."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.config.hf import ConfigReader
from thalweg.models.parts.part import MAX_DIM, Cost, Names, PlanContext, Step, all_reduce, product
from thalweg.weights.plan import Source, Target, concat, split

HEADS = "num_attention_heads"
_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, slots=True)
class MlaDims:
    """`heads` query heads of `nope` + `rope` dims against one latent of `rank` values per token. The `rope` dims of the
    key are shared by all heads and cached beside the latent; they are not rotated here (NoPE)."""

    heads: int
    rank: int
    nope: int
    rope: int
    value: int

    @property
    def head_dim(self) -> int:
        return self.nope + self.rope

    @property
    def latent(self) -> int:
        """Values cached per token: the latent and the shared part of the key."""
        return self.rank + self.rope

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """in_proj has rows q, then latent and shared key; kv_b_proj is [H, nope + value, rank], a matrix per head whose
        halves go into queries and outputs apart.

        Names: norm, q, kv_a, kv_norm, kv_b, out.
        """
        H, D, up, shards = self.heads, ctx.width, self.nope + self.value, ctx.shards

        def heads(dims: int) -> tuple[int, int]:
            return shards.even(H, HEADS, dims)

        local = (shards.count(H, HEADS), up, self.rank)
        query = Source(names["q"], (H * self.head_dim, D), 0, heads(self.head_dim))
        return [
            ctx.norm(f"{ours}.in_proj.norm.weight", names["norm"], ctx.width),
            concat(f"{ours}.in_proj.weight", [query, Source(names["kv_a"], (self.latent, D))]),
            ctx.norm(f"{ours}.kv_norm.weight", names["kv_norm"], self.rank),
            split(f"{ours}.kv_b_proj.weight", names["kv_b"], (H * up, self.rank), 0, heads(up), local=local),
            split(f"{ours}.out_proj.weight", names["out"], (D, H * self.value), 1, heads(self.value)),
        ]

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
        return [
            product("MLA in", D * (H * self.head_dim + self.latent), step),
            Cost("MLA attention", up * step.dtype_bytes + cache, 2 * up * rows + flops),
            product("MLA out", D * H * self.value, step),
            *all_reduce("MLA sum over ranks", D, step),
        ]


def read_mla(reader: ConfigReader, *, needed: bool) -> MlaDims | None:
    """From the keys that DeepSeek's layout has. None, the keys passed over, if no layer needs it."""
    if not needed:
        reader.skip("num_attention_heads", "num_key_value_heads", "qk_head_dim", *_KEYS)
        return None
    heads, rank, nope, rope, value = (reader.get_int(key, low=1, high=MAX_DIM) for key in (HEADS, *_KEYS))
    # The latent is expanded for every query head; a smaller number would mean grouped heads, of which MLA has none.
    reader.agree("num_key_value_heads", heads)
    reader.agree("qk_head_dim", nope + rope)
    return MlaDims(heads, rank, nope, rope, value)
