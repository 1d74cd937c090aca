"""Ops "kda_mixer_decode" and "kda_mixer_prefill": everything between the input and the output projection of a KDA
layer, for one token of each sequence and for prompts.

From the fused input projection: short convolution with SiLU, the up-projections of decay and output gate, kda_gate,
sigmoid(beta), the KDA recurrence, and the gated RMSNorm. Convolution and recurrent states are updated in place
(packages conv1d and kda say how, and what holds for slots that are named twice or not at all). For prompts, which a
matrix library serves better, the up-projections come ready.

Implementations of "kda_mixer_decode" may read slot numbers and states while the kernel ahead of them in the stream
still runs. Between the call and whatever wrote these there must be the start of an ordinary launch, or of a graph: a
step begins with one, and calls the mixer of each layer once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.delta import mixer_cpp, mixer_cuda, prefill_cpp, prefill_cuda
from thalweg.ops.delta.conv1d import PIECE
from thalweg.ops.delta.kda_mixer import reference
from thalweg.ops.host_tables import Boundaries
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaMixerDims:
    H: int
    K: int
    V: int
    R: int  # rank of decay and gate
    W: int  # inputs that a convolution's state remembers


class KdaMixerDecode(Protocol):
    def __call__(
        self,
        proj_BX: Tensor,
        *,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        w_up_2OR: Tensor,
        A_log_H: Tensor,
        dt_bias_HK: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
    ) -> Tensor:
        """o_BO in proj's dtype, O = H * V with K = V.

        proj_BX is [q, k, v (3 * H * K = C) | beta (H) | decay (R) | gate (R)], raw, with a unit last stride.
        conv_weight_CW [C, taps] and conv_state_NWC [N, taps - 1, C] are those of package conv1d. w_up_2OR stacks
        the up-projections of decay (0) and gate (1). A_log_H and dt_bias_HK are fp32. state_NHVK is fp32 or bf16.
        slots_B is int64. Weights and states are contiguous.
        """


class KdaMixerPrefill(Protocol):
    def __call__(
        self,
        proj_TX: Tensor,
        up_T2O: Tensor,
        *,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        A_log_H: Tensor,
        dt_bias_HK: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        boundaries: Boundaries = (),
    ) -> Tensor:
        """o_TO for sequences of any length: sequence b owns tokens offsets[b]:offsets[b + 1]; length 0 leaves its
        states bit-identical.

        proj_TX as in "kda_mixer_decode", of which decay and gate are not read: up_T2O has them, projected up, with a
        unit last stride. For each (b, n, slot) of `boundaries` the states of sequence b after n of its tokens, a
        multiple of kda.BOUNDARY, are written into `slot` too, which no sequence of the call has.
        """


KDA_MIXER_DECODE: Op[KdaMixerDims, KdaMixerDecode] = Op("kda_mixer_decode", KdaMixerDims, rows="decodes")
KDA_MIXER_PREFILL: Op[KdaMixerDims, KdaMixerPrefill] = Op("kda_mixer_prefill", KdaMixerDims, rows="prefills")


def _triton(where: Where, dims: KdaMixerDims) -> KdaMixerDecode:
    from thalweg.ops.delta.kda_mixer import triton

    return triton.kda_mixer_decode


def _triton_refuses(where: Where, dims: KdaMixerDims) -> Refusal:
    K, V, R = dims.K, dims.V, dims.R
    if K != V or any(n < 16 or n > 128 or n & (n - 1) for n in (K, R)):
        return f"needs K = V and R to be powers of two from 16 to 128, not {K}, {V} and {R}"
    if dims.W != 3:
        return f"needs a convolution that remembers W = 3 inputs, not {dims.W}"
    return why_not(where)


def _cuda_refuses(where: Where, dims: KdaMixerDims) -> Refusal:
    H, K, V, R, W = dims.H, dims.K, dims.V, dims.R, dims.W
    if (K, V, R, W) != (128, 128, 128, 3) or H % 4:
        return f"needs K = V = R = 128, W = 3 and a multiple of 4 heads, not {K}, {V}, {R}, {W} and {H}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return cuda_build.why_not(where)


def _cpp_refuses(where: Where, dims: KdaMixerDims) -> Refusal:
    if dims.K != dims.V or dims.K % 16:
        return f"needs K = V, a multiple of 16, not {dims.K} and {dims.V}"
    return cpu_build.why_not(where)


def _triton_prefill(where: Where, dims: KdaMixerDims) -> KdaMixerPrefill:
    from thalweg.ops.delta.conv1d.triton import conv1d_prefill
    from thalweg.ops.delta.kda.triton.gate import kda_gate
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill
    from thalweg.ops.norm.triton.gated import gated_rms_norm

    return reference.prefill_by(conv1d_prefill, kda_gate, kda_prefill, gated_rms_norm)


def _triton_prefill_refuses(where: Where, dims: KdaMixerDims) -> Refusal:
    if not 1 <= min(dims.K, dims.V) <= max(dims.K, dims.V) <= 128:
        return f"needs heads of at most 128, not {dims.K} and {dims.V}"
    if dims.W > PIECE:  # a later piece would reach back to the state, which the sequence's first one moves on
        return f"needs a convolution that remembers at most {PIECE} inputs, not {dims.W}"
    return why_not(where)


def _cuda_prefill_refuses(where: Where, dims: KdaMixerDims) -> Refusal:
    if (dims.K, dims.V, dims.W) != (128, 128, 3) or dims.H % 2:
        return f"needs K = V = 128, W = 3 and an even number of heads, not {dims.K}, {dims.V}, {dims.W} and {dims.H}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return why_not(where) or cuda_build.why_not(where)


def _cpp_prefill_refuses(where: Where, dims: KdaMixerDims) -> Refusal:
    if dims.W > PIECE:
        return f"needs a convolution that remembers at most {PIECE} inputs, not {dims.W}"
    return _cpp_refuses(where, dims)


register(KDA_MIXER_DECODE, "reference", lambda *_: reference.kda_mixer_decode)
register(KDA_MIXER_DECODE, "cpp", lambda *_: mixer_cpp.kda_mixer_decode, supports=_cpp_refuses, priority=10)
register(KDA_MIXER_DECODE, "triton", _triton, supports=_triton_refuses, priority=10)
register(KDA_MIXER_DECODE, "cuda", lambda *_: mixer_cuda.kda_mixer_decode, supports=_cuda_refuses, priority=20)
register(KDA_MIXER_PREFILL, "reference", lambda *_: reference.kda_mixer_prefill)
register(KDA_MIXER_PREFILL, "cpp", lambda *_: prefill_cpp.kda_mixer_prefill, supports=_cpp_prefill_refuses, priority=10)
register(KDA_MIXER_PREFILL, "triton", _triton_prefill, supports=_triton_prefill_refuses, priority=10, capturable=True)
register(
    KDA_MIXER_PREFILL,
    "cuda",
    lambda *_: prefill_cuda.kda_mixer_prefill,
    supports=_cuda_prefill_refuses,
    priority=20,
    capturable=True,
)
