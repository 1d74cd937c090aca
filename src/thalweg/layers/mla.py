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
from thalweg.ops.attention.mla import MLA_PREFILL, MLA_WRITE, MlaPrefillDims, MlaWriteDims
from thalweg.ops.attention.mla_mixer import MLA_MIXER_DECODE, MlaMixerDims
from thalweg.ops.heads import MERGE_HEADS, SPLIT_HEADS, HeadsDims


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
        self.in_proj = NormLinear(
            ctx.below("in_proj"), width, [self.split[0], rank + rope], eps
        )  # q_proj and kv_a_proj in one
        self.kv_norm = RMSNorm(ctx, rank, eps)
        self.kv_b_proj = LatentUp(ctx, H, nope + value, rank)
        self.out_proj = LinearAdd(ctx.below("out_proj"), H * value, width)
        self.cache_specs = {"latent": PagedSpec((rank + rope,), ctx.dtype_name)}
        sizes = {"H": H, "K": nope, "V": value, "R": rank, "P": rope}
        self._mixer_decode = ctx.op(MLA_MIXER_DECODE, MlaMixerDims(**sizes, S=ctx.block_size))
        self._write = ctx.op(MLA_WRITE, MlaWriteDims(R=rank, P=rope))
        self._prefill = ctx.op(MLA_PREFILL, MlaPrefillDims(**sizes))
        self._split_heads = ctx.op(SPLIT_HEADS, HeadsDims(X=nope + rope))
        self._merge_heads = ctx.op(MERGE_HEADS, HeadsDims(X=value))

    def forward(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        proj_TX, latent_MSC = self.in_proj(x_TD), cache["latent"]
        w_uk_HKR, w_uv_HVR = self.kv_b_proj.weight.split([self.nope, self.value], dim=1)
        n, parts = batch.num_decodes, []
        if n:
            parts.append(
                self._mixer_decode(
                    proj_TX[:n],
                    kv_norm_weight_R=self.kv_norm.weight,
                    w_uk_HKR=w_uk_HKR,
                    w_uv_HVR=w_uv_HVR,
                    blocks_MSC=latent_MSC,
                    block_tables_BN=batch.block_tables_BN[:n],
                    context_lens_B=batch.context_lens_B,
                    block_rows_B=batch.block_rows_T[:n],
                    scale=self.scale,
                    eps=self.kv_norm.eps,
                )
            )
        if n < len(proj_TX):
            q_TO, c_TR, k_rope_TP = proj_TX[n:].split(self.split, dim=-1)
            self._write(torch.cat([self.kv_norm(c_TR), k_rope_TP], dim=-1), latent_MSC, batch.block_rows_T[n:])
            o_THV = self._prefill(
                self._split_heads(q_TO),
                latent_MSC,
                block_tables_BN=batch.block_tables_BN[n:],
                context_lens=batch.starts,
                offsets=batch.prefill_offsets,
                w_uk_HKR=w_uk_HKR,
                w_uv_HVR=w_uv_HVR,
                scale=self.scale,
            )
            parts.append(self._merge_heads(o_THV))
        return self.out_proj.of_parts(parts, x_TD)
