"""Ops "gdn_prefill" and "gdn_mixer_decode": Gated DeltaNet (arXiv:2412.06464), the delta rule of package kda with one
decay per head, and H value heads of which H / G neighbours share each of G key heads.

    g    = -exp(A_log) * softplus(a + dt_bias)     a log decay per value head, <= 0
    beta = sigmoid(b)

Package kda says what a state is, how it is updated, and what holds for slots that are named twice or not at all, and
package kda_mixer when a mixer may read slot numbers and states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.delta.gdn import reference
from thalweg.ops.delta.kda import KDA_PREFILL, KdaDims
from thalweg.ops.host_tables import Boundaries
from thalweg.ops.registry import Op, Refusal, Resolver, Where, register
from thalweg.ops.toolchain import cuda_build


@dataclass(frozen=True, slots=True, kw_only=True)
class GdnDims:
    G: int  # key heads
    H: int  # value heads
    K: int
    V: int
    W: int  # inputs that a convolution's state remembers


class GdnPrefill(Protocol):
    def __call__(
        self,
        q_TGK: Tensor,
        k_TGK: Tensor,
        v_THV: Tensor,
        a_TH: Tensor,
        b_TH: Tensor,
        *,
        A_log_H: Tensor,
        dt_bias_H: Tensor,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        boundaries: Boundaries = (),
    ) -> Tensor:
        """o_THV for sequences of any length, as op "kda_prefill" gives it for repeated key heads; g and beta are
        computed in fp32; `boundaries` likewise. Inputs of tokens may have any strides."""


class GdnMixerDecode(Protocol):
    def __call__(
        self,
        proj_BX: Tensor,
        *,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        A_log_H: Tensor,
        dt_bias_H: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
    ) -> Tensor:
        """o_BO in proj's dtype, O = H * V: everything between the input and the output projection for one token.

        proj_BX is [q (G * K) | k (G * K) | v (H * V) | z (H * V) | b (H) | a (H)], raw, with a unit last stride; the
        convolution with SiLU covers the first C = 2 * G * K + H * V columns. The result is the recurrence's output, in
        fp32 or rounded to proj's dtype, through "gated_rms_norm" with SiLU of z. A_log, dt_bias and the norm's weight
        are fp32, the state is fp32 or bf16. slots_B is int64. Weights and states are contiguous. What package
        kda_mixer says of reading slot numbers and states early holds here too.
        """


GDN_PREFILL: Op[GdnDims, GdnPrefill] = Op("gdn_prefill", GdnDims, rows="prefills")
GDN_MIXER_DECODE: Op[GdnDims, GdnMixerDecode] = Op("gdn_mixer_decode", GdnDims, rows="decodes")

MAX_RATIO = 8  # blocks of a cluster that every Hopper GPU takes


def _by_kda(where: Where, dims: GdnDims) -> GdnPrefill:
    kda_prefill = Resolver().resolve(KDA_PREFILL, where, KdaDims(H=dims.H, K=dims.K, V=dims.V))
    return reference.prefill_by(kda_prefill)


def _by_kda_refuses(where: Where, dims: GdnDims) -> Refusal:
    return None if where.device == "cuda" else f"takes the kernels of cuda, not of {where.device}"


def _cuda_mixer(where: Where, dims: GdnDims) -> GdnMixerDecode:
    from thalweg.ops.delta import mixer_cuda

    return mixer_cuda.gdn_mixer_decode


def _cuda_mixer_refuses(where: Where, dims: GdnDims) -> Refusal:
    G, H, K, V, W = dims.G, dims.H, dims.K, dims.V, dims.W
    if (K, V, W) != (128, 128, 3) or H % 2:
        return f"needs K = V = 128, W = 3 and an even number of heads, not {K}, {V}, {W} and {H}"
    if H // G > MAX_RATIO:
        return f"needs at most {MAX_RATIO} value heads per key head, not {H // G}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return cuda_build.why_not(where)


register(GDN_PREFILL, "reference", lambda *_: reference.gdn_prefill)
register(GDN_PREFILL, "kda", _by_kda, supports=_by_kda_refuses, priority=10, capturable=True)
register(GDN_MIXER_DECODE, "reference", lambda *_: reference.gdn_mixer_decode)
register(GDN_MIXER_DECODE, "cuda", _cuda_mixer, supports=_cuda_mixer_refuses, priority=20)
