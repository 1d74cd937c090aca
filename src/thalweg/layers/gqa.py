"""Gated full attention with grouped heads, rotary positions and a norm per head, over keys and values in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thalweg.cache.specs import PagedSpec
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.linear import LinearAdd, NormLinear
from thalweg.layers.norm import NormWeight
from thalweg.ops.attention.gqa import GQA_MIXER_DECODE, GQA_PREFILL, GQA_PREPARE, GqaDims
from thalweg.ops.norm import NextNorm, Normed


class GatedAttention(nn.Module):
    """x_TD -> x + attention(norm(x)) over this rank's heads. Caches PagedSpecs "keys" and "values" (G, K).

    Each query head and its output gate stand side by side in one projection with keys and values. `frequencies` are the
    angles per position of the dims that are rotated, `rope_scale` multiplies their cosines and sines.
    """

    frequencies_F: Tensor

    def __init__(
        self,
        ctx: BuildContext,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        frequencies: Sequence[float],
        rope_scale: float,
        eps: float,
    ) -> None:
        super().__init__()
        H = ctx.shards.count(heads, "num_attention_heads")
        G, K = ctx.shards.shared_count(kv_heads, "num_key_value_heads"), head_dim
        self.rope_scale = rope_scale
        self.in_proj = NormLinear(ctx.below("in_proj"), width, [2 * H * K, G * K, G * K], eps)
        self.q_norm = NormWeight(ctx, K, eps)
        self.k_norm = NormWeight(ctx, K, eps)
        self.out_proj = LinearAdd(ctx.below("out_proj"), H * K, width)
        self.register_buffer("frequencies_F", torch.tensor(frequencies, dtype=torch.float32, device=ctx.device))
        spec = PagedSpec((G, K), ctx.dtype_name)
        self.cache_specs = {"keys": spec, "values": spec}
        dims = GqaDims(H=H, G=G, K=K, R=2 * len(frequencies), S=ctx.block_size)
        self._mixer_decode = ctx.op(GQA_MIXER_DECODE, dims)
        self._prepare = ctx.op(GQA_PREPARE, dims)
        self._prefill = ctx.op(GQA_PREFILL, dims)

    def forward(
        self,
        x_TD: Tensor,
        batch: Batch,
        cache: LayerCache,
        normed: Normed | None = None,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        proj_TX = self.in_proj(x_TD, normed)
        keys_MSGK, values_MSGK = cache["keys"], cache["values"]
        n, tables, parts = batch.num_decodes, batch.block_tables_BN, []
        if n:
            o_BO = self._mixer_decode(
                proj_TX[:n],
                q_norm_weight_K=self.q_norm.weight,
                k_norm_weight_K=self.k_norm.weight,
                eps=self.q_norm.eps,
                frequencies_F=self.frequencies_F,
                rope_scale=self.rope_scale,
                positions_B=batch.positions_T[:n],
                keys_MSGK=keys_MSGK,
                values_MSGK=values_MSGK,
                block_rows_B=batch.block_rows_T[:n],
                block_tables_BN=tables[:n],
                context_lens_B=batch.context_lens_B,
            )
            parts.append(o_BO)
        if n < proj_TX.shape[0]:
            q_THK = self._prepare(
                proj_TX[n:],
                q_norm_weight_K=self.q_norm.weight,
                k_norm_weight_K=self.k_norm.weight,
                eps=self.q_norm.eps,
                frequencies_F=self.frequencies_F,
                rope_scale=self.rope_scale,
                positions_T=batch.positions_T[n:],
                keys_MSGK=keys_MSGK,
                values_MSGK=values_MSGK,
                block_rows_T=batch.block_rows_T[n:],
            )
            o_TO = self._prefill(
                q_THK,
                proj_TX[n:],
                keys_MSGK=keys_MSGK,
                values_MSGK=values_MSGK,
                block_tables_BN=tables[n:],
                starts=batch.starts,
                offsets=batch.prefill_offsets,
            )
            parts.append(o_TO)
        return self.out_proj.of_parts(parts, x_TD, next_norm)
