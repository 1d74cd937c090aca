"""Both norms in one launch, a program for each row and part; and in two, which the one is held against bit by bit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.norm.triton.rms import _rms_norm
from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def _split_norms(
    x_ptr,
    q_weight_ptr,
    kv_weight_ptr,
    q_ptr,
    latent_ptr,
    x_stride,
    eps,
    Q: tl.constexpr,
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    # The wait of a dependent launch is in the norm, so every program executes it.
    if tl.program_id(1) == 0:
        _rms_norm(x_ptr, q_weight_ptr, q_ptr, x_stride, eps, Q, BLOCK_Q, PDL)
    else:
        _rms_norm(x_ptr + Q, kv_weight_ptr, latent_ptr, x_stride, eps, R, BLOCK_R, PDL)


def _num_warps(Q: int, R: int) -> int:
    """As op "rms_norm" has it for the longer part: sums in one order are equal bit for bit."""
    return min(8, max(1, triton.next_power_of_2(max(Q, R)) // 512))


def _empty_parts(x_TX: Tensor, Q: int, R: int) -> tuple[Tensor, Tensor, Tensor]:
    return x_TX.new_empty(x_TX.shape[0], Q), x_TX.new_empty(x_TX.shape[0], R), x_TX[:, Q + R :]


def split_norms(x_TX: Tensor, q_weight_Q: Tensor, kv_weight_R: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    Q, R = len(q_weight_Q), len(kv_weight_R)
    q_TQ, latent_TR, shared_TP = _empty_parts(x_TX, Q, R)
    if len(x_TX):
        _split_norms[(len(x_TX), 2)](
            x_TX,
            q_weight_Q,
            kv_weight_R,
            q_TQ,
            latent_TR,
            x_TX.stride(0),
            eps,
            Q,
            R,
            triton.next_power_of_2(Q),
            triton.next_power_of_2(R),
            num_warps=_num_warps(Q, R),
            **pdl_options(x_TX),
        )
    return q_TQ, latent_TR, shared_TP


def split_norms_in_two_launches(
    x_TX: Tensor, q_weight_Q: Tensor, kv_weight_R: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The unfused path: the same arithmetic in the same order, a launch for each norm."""
    Q, R = len(q_weight_Q), len(kv_weight_R)
    parts = _empty_parts(x_TX, Q, R)
    if len(x_TX):
        for x, weight, y in ((x_TX[:, :Q], q_weight_Q, parts[0]), (x_TX[:, Q : Q + R], kv_weight_R, parts[1])):
            D = len(weight)
            block = triton.next_power_of_2(D)
            options = dict(num_warps=_num_warps(Q, R), **pdl_options(x_TX))
            _rms_norm[(len(x_TX),)](x, weight, y, x.stride(0), eps, D, block, **options)
    return parts
