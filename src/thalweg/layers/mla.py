"""Multi-head latent attention without rotary positions (NoPE MLA), against a paged latent cache.

DeepSeek-V2 (arXiv:2405.04434) for the latent form; Kimi Linear leaves the "rope" dimensions unrotated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.cache.specs import PagedSpec
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.linear import LinearAdd, NormLinear
from thalweg.layers.norm import RMSNorm


class LatentUp(nn.Module):
    """kv_b_proj per head: weight [H, nope + V, R]."""

    def __init__(self, ctx: BuildContext, heads: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = ctx.weight(heads, out_features, rank)


class MultiHeadLatentAttention(nn.Module):
    """x_TD -> x + attention(norm(x)) over this rank's heads. Caches PagedSpec "latent" (R + P,): the normed latent and
    the shared "rope" key.

    Decode is absorbed: queries move into latent space and one read of the cache serves all heads. Prefill expands.
    """

    def __init__(
        self,
        ctx: BuildContext,
        *,
        width: int,
        heads: int,
        nope: int,
        rope: int,
        value: int,
        rank: int,
        eps: float,
    ) -> None:
        super().__init__()
        H = ctx.shards.count(heads, "num_attention_heads")
        self.H, self.nope, self.rope, self.value, self.rank = H, nope, rope, value, rank
        self.scale = (nope + rope) ** -0.5
        self.split = [H * (nope + rope), rank, rope]
        self.in_proj = NormLinear(ctx, width, sum(self.split), eps)  # q_proj and kv_a_proj in one
        self.kv_norm = RMSNorm(ctx, rank, eps)
        self.kv_b_proj = LatentUp(ctx, H, nope + value, rank)
        self.out_proj = LinearAdd(ctx, H * value, width)
        self.cache_specs = {"latent": PagedSpec((rank + rope,), ctx.dtype_name)}
        dims = {"H": H, "K": nope, "V": value, "R": rank, "P": rope}
        self._mixer_decode = ctx.op("mla_mixer_decode", **dims)
        self._write = ctx.op("mla_write", R=rank, P=rope)
        self._prefill = ctx.op("mla_prefill", **dims)

    def forward(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        proj_TX, latent_MSC = self.in_proj(x_TD), cache["latent"]
        w_uk_HKR, w_uv_HVR = self.kv_b_proj.weight.split([self.nope, self.value], dim=1)
        n, parts = batch.num_decodes, []
        if n:
            where = (latent_MSC, batch.block_tables_BN[:n], batch.context_lens_B, batch.block_rows_T[:n])
            weights = (self.kv_norm.weight, w_uk_HKR, w_uv_HVR)
            parts.append(self._mixer_decode(proj_TX[:n], *weights, *where, self.scale, self.kv_norm.eps))
        if n < len(proj_TX):
            q_TX, c_TR, k_rope_TP = proj_TX[n:].split(self.split, dim=-1)
            self._write(torch.cat([self.kv_norm(c_TR), k_rope_TP], dim=-1), latent_MSC, batch.block_rows_T[n:])
            q_THX = q_TX.unflatten(-1, (self.H, self.nope + self.rope))  # t (h x) -> t h x
            spans = (batch.block_tables_BN[n:], batch.starts, batch.prefill_offsets)
            o_THV = self._prefill(q_THX, latent_MSC, *spans, w_uk_HKR, w_uv_HVR, self.scale)
            parts.append(o_THV.flatten(1))  # t h v -> t (h v)
        return self.out_proj.of_parts(parts, x_TD)
