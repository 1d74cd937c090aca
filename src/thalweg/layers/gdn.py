"""Gated DeltaNet (arXiv:2412.06464): a gated delta rule with one decay per head, as Qwen3-Next and Qwen3.5 have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.cache.specs import StateSpec
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.delta import DeltaMixer, ShortConv
from thalweg.layers.linear import LinearAdd, NormLinear
from thalweg.layers.norm import NormWeight
from thalweg.ops.delta.gdn import GDN_MIXER_DECODE, GDN_MIXER_PREFILL, GdnDims
from thalweg.ops.delta.gdn_decode_add import GDN_DECODE_ADD, GdnDecodeAddDims, refusal
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8


class GatedDeltaNet(DeltaMixer):
    """x_TD -> x + mixed(norm(x)) over this rank's heads. Caches StateSpecs "conv" (taps - 1, C) and "recurrent"
    (H, V, K), C = 2 * G * K + H * V.

    q, k, v, z, b and a come from one matrix; q, k and v share one convolution.
    """

    def __init__(
        self,
        ctx: BuildContext,
        *,
        width: int,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        taps: int,
        eps: float,
    ) -> None:
        super().__init__()
        G = ctx.shards.shared_count(key_heads, "linear_num_key_heads")
        H = ctx.shards.count(value_heads, "linear_num_value_heads")
        K, V, W = key_dim, value_dim, taps - 1
        C = 2 * G * K + H * V
        self.in_proj = NormLinear(ctx.below("in_proj"), width, [G * K, G * K, H * V, H * V, H, H], eps)
        self.conv = ShortConv(ctx, C, taps)
        self.A_log = ctx.weight(H, dtype=torch.float32)
        self.dt_bias = ctx.weight(H, dtype=torch.float32)
        self.out_norm = NormWeight(ctx, V, eps, torch.float32)
        self.out_proj = LinearAdd(ctx.below("out_proj"), H * V, width)
        self.cache_specs = {
            "conv": StateSpec((W, C), ctx.dtype_name),
            "recurrent": StateSpec((H, V, K), ctx.state_dtype),
        }
        dims = GdnDims(G=G, H=H, K=K, V=V, W=W)
        self._mixer_decode = ctx.op(GDN_MIXER_DECODE, dims)
        self._mixer_prefill = ctx.op(GDN_MIXER_PREFILL, dims)
        # Whoever asks for one of them by name is to have it.
        asked = any(ctx.resolver.prefers(op.name) for op in (GDN_MIXER_DECODE, LINEAR_ADD_FP8))
        if self.out_proj.fp8 is not None and ctx.mesh.tp_size == 1 and not asked:
            together = GdnDecodeAddDims(mixer=dims, linear=self.out_proj.fp8)
            if refusal(ctx.where, together) is None:
                self._mixer_decode_add = ctx.op(GDN_DECODE_ADD, together)
                self.adds_decodes = True

    def _mix_decode(self, proj_BX: Tensor, slots_B: Tensor, cache: LayerCache) -> Tensor:
        return self._mixer_decode(proj_BX, **self._inputs(slots_B, cache))

    def _decode_add(self, proj_BX: Tensor, x_BD: Tensor, slots_B: Tensor, cache: LayerCache) -> Tensor:
        inputs = self._inputs(slots_B, cache)

        def apart(proj_BX: Tensor, x_BD: Tensor) -> Tensor:
            y_BD: Tensor = self.out_proj(self._mixer_decode(proj_BX, **inputs), x_BD)
            return y_BD

        q_OD, scale_OB = self.out_proj.tensors()
        return self._mixer_decode_add(proj_BX, x_BD, apart, q_OD=q_OD, scale_OB=scale_OB, **inputs)

    def _inputs(self, slots_B: Tensor, cache: LayerCache) -> dict[str, Any]:
        return dict(
            conv_weight_CW=self.conv.weight,
            conv_state_NWC=cache["conv"],
            A_log_H=self.A_log,
            dt_bias_H=self.dt_bias,
            norm_weight_V=self.out_norm.weight,
            eps=self.out_norm.eps,
            state_NHVK=cache["recurrent"],
            slots_B=slots_B,
        )

    def _mix_prefill(self, proj_TX: Tensor, slots_B: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        inputs = self._inputs(slots_B, cache)
        return self._mixer_prefill(proj_TX, **inputs, offsets=batch.prefill_offsets, boundaries=batch.boundaries)
