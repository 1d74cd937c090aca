"""Multi-head latent attention without rotary positions (NoPE MLA), against a paged latent cache.

DeepSeek-V2 (arXiv:2405.04434) for the latent form; Kimi Linear leaves the "rope" dimensions unrotated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.cache.specs import PagedSpec
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.linear import Linear
from thalweg.layers.norm import RMSNorm


class LatentUp(nn.Module):
    """kv_b_proj per head: weight [H, nope + V, R]."""

    def __init__(self, ctx: BuildContext, heads: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = ctx.weight(heads, out_features, rank)


class MultiHeadLatentAttention(nn.Module):
    """x_TD -> y_TD over this rank's heads. Caches PagedSpec(R + P): the normed latent and the shared "rope" key.

    Decode is absorbed: queries move into latent space and one read of the cache serves all heads.
    """

    def __init__(
        self, ctx: BuildContext, *, width: int, heads: int, nope: int, rope: int, value: int, rank: int, eps: float
    ) -> None:
        super().__init__()
        H = ctx.shard(heads, "num_attention_heads")
        self.H, self.nope, self.rope, self.value, self.rank = H, nope, rope, value, rank
        self.mesh, self.scale = ctx.mesh, (nope + rope) ** -0.5
        self.q_proj = Linear(ctx, width, H * (nope + rope))
        self.kv_a_proj = Linear(ctx, width, rank + rope)
        self.kv_norm = RMSNorm(ctx, rank, eps)
        self.kv_b_proj = LatentUp(ctx, H, nope + value, rank)
        self.out_proj = Linear(ctx, H * value, width)
        self.cache_spec = PagedSpec(rank + rope, ctx.dtype_name)
        dims = {"H": H, "R": rank, "P": rope}
        self._write = ctx.op("mla_write", R=rank, P=rope)
        self._decode = ctx.op("mla_decode", **dims)
        self._prefill = ctx.op("mla_prefill", **dims, K=nope, V=value)

    def forward(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        pages = cache["pages"]
        q_THX = self.q_proj(x_TD).unflatten(-1, (self.H, self.nope + self.rope))  # t (h x) -> t h x
        c_TR, k_rope_TP = self.kv_a_proj(x_TD).split([self.rank, self.rope], dim=-1)
        self._write(torch.cat([self.kv_norm(c_TR)[0], k_rope_TP], dim=-1), pages, batch.page_rows_T)
        w_uk_HKR, w_uv_HVR = self.kv_b_proj.weight.split([self.nope, self.value], dim=1)

        n, parts = batch.num_decodes, []
        if n:
            q_nope_HBK = q_THX[:n, :, : self.nope].transpose(0, 1)
            q_latent_BHR = torch.bmm(q_nope_HBK, w_uk_HKR).transpose(0, 1)
            q_BHC = torch.cat([q_latent_BHR, q_THX[:n, :, self.nope :]], dim=-1)
            o_BHR = self._decode(q_BHC, pages, batch.block_tables_BN[:n], batch.decode_lens, self.scale, self.rank)
            parts.append(torch.bmm(o_BHR.transpose(0, 1), w_uv_HVR.transpose(1, 2)).transpose(0, 1))
        if n < x_TD.shape[0]:
            tables, starts, offsets = batch.block_tables_BN[n:], batch.prefill_starts, batch.prefill_offsets
            parts.append(
                self._prefill(q_THX[n:], pages, tables, starts, offsets, w_uk_HKR, w_uv_HVR, self.scale)
            )
        o_THV = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.mesh.all_reduce(self.out_proj(o_THV.flatten(1)))  # t h v -> t (h v)
