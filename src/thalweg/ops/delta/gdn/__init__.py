"""Ops "gdn_mixer_decode" and "gdn_mixer_prefill": everything between the input and the output projection of a Gated
DeltaNet layer (arXiv:2412.06464), for one token of each sequence and for prompts. It is the delta rule of package kda
with one decay per head, and H value heads of which H / G neighbours share each of G key heads.

    g    = -exp(A_log) * softplus(a + dt_bias)     a log decay per value head, <= 0
    beta = sigmoid(b)

Package kda says what a state is, how it is updated, and what holds for slots that are named twice or not at all, and
package kda_mixer when a mixer of a decode step may read slot numbers and states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.delta import mixer_cpp, mixer_cuda, prefill_cpp, prefill_cuda
from thalweg.ops.delta.conv1d import PIECE
from thalweg.ops.delta.gdn import reference
from thalweg.ops.host_tables import Boundaries
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper


@dataclass(frozen=True, slots=True, kw_only=True)
class GdnDims:
    G: int  # key heads
    H: int  # value heads
    K: int
    V: int
    W: int  # inputs that a convolution's state remembers


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


class GdnMixerPrefill(Protocol):
    def __call__(
        self,
        proj_TX: Tensor,
        *,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        A_log_H: Tensor,
        dt_bias_H: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        boundaries: Boundaries = (),
    ) -> Tensor:
        """o_TO for sequences of any length, proj_TX as in "gdn_mixer_decode", sequences and boundaries as in
        "kda_mixer_prefill". The convolution's outputs may be rounded to proj's dtype."""


GDN_MIXER_DECODE: Op[GdnDims, GdnMixerDecode] = Op("gdn_mixer_decode", GdnDims, rows="decodes")
GDN_MIXER_PREFILL: Op[GdnDims, GdnMixerPrefill] = Op("gdn_mixer_prefill", GdnDims, rows="prefills")

MAX_RATIO = 8  # blocks of a cluster that every Hopper GPU takes


def _triton_prefill(where: Where, dims: GdnDims) -> GdnMixerPrefill:
    from thalweg.ops.delta.conv1d.triton import conv1d_prefill
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill
    from thalweg.ops.norm.triton.gated import gated_rms_norm

    return reference.mixer_prefill_by(conv1d_prefill, reference.prefill_by(kda_prefill), gated_rms_norm)


def _triton_prefill_refuses(where: Where, dims: GdnDims) -> Refusal:
    if not 1 <= min(dims.K, dims.V) <= max(dims.K, dims.V) <= 128:
        return f"needs heads of at most 128, not {dims.K} and {dims.V}"
    if dims.W > PIECE:  # a later piece would reach back to the state, which the sequence's first one moves on
        return f"needs a convolution that remembers at most {PIECE} inputs, not {dims.W}"
    return why_not(where)


def _cuda_mixer_refuses(where: Where, dims: GdnDims) -> Refusal:
    G, H, K, V, W = dims.G, dims.H, dims.K, dims.V, dims.W
    if (K, V, W) != (128, 128, 3) or H % 2:
        return f"needs K = V = 128, W = 3 and an even number of heads, not {K}, {V}, {W} and {H}"
    if H // G > MAX_RATIO:
        return f"needs at most {MAX_RATIO} value heads per key head, not {H // G}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return cuda_build.why_not(where)


def _cpp_refuses(where: Where, dims: GdnDims) -> Refusal:
    if dims.K % 16 or dims.V % 16:
        return f"needs K and V to be multiples of 16, not {dims.K} and {dims.V}"
    return cpu_build.why_not(where)


def _cuda_prefill_refuses(where: Where, dims: GdnDims) -> Refusal:
    if (dims.K, dims.V, dims.W) != (128, 128, 3):
        return f"needs K = V = 128 and W = 3, not {dims.K}, {dims.V} and {dims.W}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return why_not(where) or cuda_build.why_not(where) or why_not_hopper()


def _cpp_prefill_refuses(where: Where, dims: GdnDims) -> Refusal:
    if dims.W > PIECE:
        return f"needs a convolution that remembers at most {PIECE} inputs, not {dims.W}"
    return _cpp_refuses(where, dims)


register(GDN_MIXER_DECODE, "reference", lambda *_: reference.gdn_mixer_decode)
register(GDN_MIXER_DECODE, "cpp", lambda *_: mixer_cpp.gdn_mixer_decode, supports=_cpp_refuses, priority=10)
register(GDN_MIXER_DECODE, "cuda", lambda *_: mixer_cuda.gdn_mixer_decode, supports=_cuda_mixer_refuses, priority=20)
register(GDN_MIXER_PREFILL, "reference", lambda *_: reference.gdn_mixer_prefill)
register(GDN_MIXER_PREFILL, "cpp", lambda *_: prefill_cpp.gdn_mixer_prefill, supports=_cpp_prefill_refuses, priority=10)
register(GDN_MIXER_PREFILL, "triton", _triton_prefill, supports=_triton_prefill_refuses, priority=10, capturable=True)
register(
    GDN_MIXER_PREFILL,
    "cuda",
    lambda *_: prefill_cuda.gdn_mixer_prefill,
    supports=_cuda_prefill_refuses,
    priority=20,
    capturable=True,
)
