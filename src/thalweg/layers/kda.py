"""Kimi Delta Attention (Kimi Linear, arXiv:2510.26692): a gated delta rule with a decay per key channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thalweg.cache.specs import StateSpec
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.delta import DeltaMixer, ShortConv
from thalweg.layers.linear import LinearAdd, NormLinear
from thalweg.layers.norm import NormWeight
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KDA_MIXER_PREFILL, KdaMixerDims
from thalweg.ops.projection import BATCHED_PROJECTION, BatchedProjectionDims


class LowRankUp(nn.Module):
    """The up-projections f_b and g_b [H*K, R] as one batched matrix [2, H*K, R]."""

    def __init__(self, ctx: BuildContext, rank: int, out_features: int) -> None:
        super().__init__()
        self.weight = ctx.weight(2, out_features, rank)
        self._op = ctx.op(BATCHED_PROJECTION, BatchedProjectionDims(R=rank, O=out_features))

    def forward(self, x_T2R: Tensor) -> Tensor:
        return self._op(x_T2R, self.weight)


class KimiDeltaAttention(DeltaMixer):
    """x_TD -> x + mixed(norm(x)) over this rank's heads. Caches StateSpecs "conv" (taps - 1, 3*H*K) and
    "recurrent" (H, V, K).

    q, k, v, beta, f_a and g_a come from one matrix; f_b and g_b from one batched matrix; q, k and v share one conv.
    """

    def __init__(
        self, ctx: BuildContext, *, width: int, heads: int, head_dim: int, rank: int, taps: int, eps: float
    ) -> None:
        super().__init__()
        H, K = ctx.shards.count(heads, "the number of KDA heads"), head_dim
        self.R = rank
        self.in_proj = NormLinear(ctx.below("in_proj"), width, [H * K, H * K, H * K, H, rank, rank], eps)
        self.up_proj = LowRankUp(ctx, rank, H * K)
        self.conv = ShortConv(ctx, 3 * H * K, taps)
        self.A_log = ctx.weight(H, dtype=torch.float32)
        self.dt_bias = ctx.weight(H, K, dtype=torch.float32)
        self.out_norm = NormWeight(ctx, K, eps)
        self.out_proj = LinearAdd(ctx.below("out_proj"), H * K, width)
        self.cache_specs = {
            "conv": StateSpec((taps - 1, 3 * H * K), ctx.dtype_name),
            "recurrent": StateSpec((H, K, K), ctx.state_dtype),
        }
        dims = KdaMixerDims(H=H, K=K, V=K, R=rank, W=taps - 1)
        self._mixer_decode = ctx.op(KDA_MIXER_DECODE, dims)
        self._mixer_prefill = ctx.op(KDA_MIXER_PREFILL, dims)

    def _mix_decode(self, proj_BX: Tensor, slots_B: Tensor, cache: LayerCache) -> Tensor:
        return self._mixer_decode(proj_BX, w_up_2OR=self.up_proj.weight, **self._inputs(slots_B, cache))

    def _mix_prefill(self, proj_TX: Tensor, slots_B: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        low_T2R = proj_TX[:, -2 * self.R :].unflatten(-1, (2, self.R))  # t (two r) -> t two r
        return self._mixer_prefill(
            proj_TX,
            self.up_proj(low_T2R),
            **self._inputs(slots_B, cache),
            offsets=batch.prefill_offsets,
            boundaries=batch.boundaries,
        )

    def _inputs(self, slots_B: Tensor, cache: LayerCache) -> dict[str, Any]:
        return dict(
            conv_weight_CW=self.conv.weight,
            conv_state_NWC=cache["conv"],
            A_log_H=self.A_log,
            dt_bias_HK=self.dt_bias,
            norm_weight_V=self.out_norm.weight,
            eps=self.out_norm.eps,
            state_NHVK=cache["recurrent"],
            slots_B=slots_B,
        )
