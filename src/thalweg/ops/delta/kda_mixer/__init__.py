"""Op "kda_mixer_decode": everything between the input and the output projection of a KDA layer, for one token.

From the fused input projection: short convolution with SiLU, the up-projections of decay and output gate, kda_gate,
sigmoid(beta), the KDA recurrence, and the gated RMSNorm. Convolution and recurrent states are updated in place
(packages conv1d and kda say how, and what holds for slots that are named twice or not at all).

Implementations may read slot numbers and states while the kernel ahead of them in the stream still runs. Between the
call and whatever wrote these there must be the start of an ordinary launch, or of a graph: a step begins with one, and
calls a layer's mixer once.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.delta.kda_mixer import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.triton_support import why_not


class KdaMixerDecode(Protocol):
    def __call__(
        self,
        proj_BX: Tensor,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        w_up_2OR: Tensor,
        A_log_H: Tensor,
        dt_bias_HK: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
        /,
    ) -> Tensor:
        """o_BO in proj's dtype, O = H * V with K = V.

        proj_BX is [q, k, v (3 * H * K = C) | beta (H) | decay (R) | gate (R)], raw. conv_weight_CW [C, taps] and
        conv_state_NWC [N, taps - 1, C] are those of conv1d_decode. w_up_2OR stacks the up-projections of decay (0) and
        gate (1). A_log_H and dt_bias_HK are fp32. state_NHVK is fp32 or bf16. slots_B is int64.
        """


def _triton(*args: Any) -> Tensor:
    from thalweg.ops.delta.kda_mixer.triton import kda_mixer_decode

    return kda_mixer_decode(*args)


def _triton_refuses(ctx: OpContext) -> str | None:
    K, V, R, W = (ctx.dims.get(name, 0) for name in "KVRW")
    if K != V or any(n < 16 or n > 128 or n & (n - 1) for n in (K, R)):
        return f"needs K = V and R to be powers of two from 16 to 128, not {K}, {V} and {R}"
    if W != 3:
        return f"needs a convolution that remembers W = 3 inputs, not {W}"
    return why_not(ctx)


def _cuda(*args: Any) -> Tensor:
    from thalweg.ops.delta.kda_mixer.cuda import kda_mixer_decode

    return kda_mixer_decode(*args)


def _cuda_refuses(ctx: OpContext) -> str | None:
    H, K, V, R, W = (ctx.dims.get(name, 0) for name in "HKVRW")
    if (K, V, R, W) != (128, 128, 128, 3) or H % 4:
        return f"needs K = V = R = 128, W = 3 and a multiple of 4 heads, not {K}, {V}, {R}, {W} and {H}"
    if ctx.dtype != "bfloat16":
        return f"needs bfloat16, not {ctx.dtype}"
    return cuda_build.why_not(ctx)


_decode: KdaMixerDecode = reference.kda_mixer_decode
register("kda_mixer_decode", "reference", _decode)
register("kda_mixer_decode", "triton", _triton, supports=_triton_refuses, priority=10)
register("kda_mixer_decode", "cuda", _cuda, supports=_cuda_refuses, priority=20)
