"""All in one launch, a program per row and part; and a launch per part, which the one is held against bit by bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.attention.mla.reference import mla_write
from thalweg.ops.attention.mla_rope.triton import rotate, rotate_heads
from thalweg.ops.norm.triton.rms import _rms_norm, load_row, store_normed
from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "block_rows_ptr"])
def _split_norms(
    x_ptr,
    q_weight_ptr,
    kv_weight_ptr,
    q_ptr,
    positions_ptr,
    frequencies_ptr,
    blocks_ptr,
    block_rows_ptr,
    x_stride,
    eps,
    rope_scale,
    Q: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROTATED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if PDL:
        gdc_launch_dependents()
    # Every program executes a wait, after what does not depend on the kernel ahead.
    part = tl.program_id(1)
    if part == 2:
        weight_Q = load_row(q_weight_ptr, Q, BLOCK_Q)
        if PDL:
            gdc_wait()
        store_normed(load_row(x_ptr, Q, BLOCK_Q), weight_Q, q_ptr + row * Q, eps, Q, BLOCK_Q)
    else:
        block_row_ptr = blocks_ptr + tl.load(block_rows_ptr + row) * (R + P)
        if part == 1:
            weight_R = load_row(kv_weight_ptr, R, BLOCK_R)
            if PDL:
                gdc_wait()
            store_normed(load_row(x_ptr + Q, R, BLOCK_R), weight_R, block_row_ptr, eps, R, BLOCK_R)
        elif not ROTATED:
            p = tl.arange(0, BLOCK_P)
            if PDL:
                gdc_wait()
            tl.store(block_row_ptr + R + p, tl.load(x_ptr + Q + R + p, mask=p < P, other=0.0), mask=p < P)
        else:
            x_ptr += Q + R
            rotate_heads(
                x_ptr,
                block_row_ptr + R,
                positions_ptr + row,
                frequencies_ptr,
                0,
                0,
                rope_scale,
                1,
                P,
                1,
                BLOCK_P,
                PDL,
            )


def _num_warps(Q: int, R: int) -> int:
    """As op "rms_norm" has it for the longer part: sums in one order are equal bit for bit."""
    return min(8, max(1, triton.next_power_of_2(max(Q, R)) // 512))


def split_norms(
    x_TX: Tensor,
    q_weight_Q: Tensor | None,
    kv_weight_R: Tensor,
    eps: float,
    *,
    positions_T: Tensor,
    frequencies_F: Tensor,
    rope_scale: float,
    blocks_MSC: Tensor,
    block_rows_T: Tensor,
) -> Tensor:
    Q, R = 0 if q_weight_Q is None else len(q_weight_Q), len(kv_weight_R)
    P = x_TX.shape[1] - Q - R
    q_TQ = x_TX.new_empty(len(x_TX), Q)
    if len(x_TX):
        _split_norms[(len(x_TX), 3 if Q else 2)](
            x_TX,
            kv_weight_R if q_weight_Q is None else q_weight_Q,  # some pointer: no program reads it without queries
            kv_weight_R,
            q_TQ,
            positions_T,
            frequencies_F,
            blocks_MSC,
            block_rows_T,
            x_TX.stride(0),
            eps,
            rope_scale,
            Q,
            R,
            P,
            triton.next_power_of_2(max(Q, 1)),
            triton.next_power_of_2(R),
            triton.next_power_of_2(P),
            len(frequencies_F) > 0,
            num_warps=_num_warps(Q, R),
            **pdl_options(x_TX),
        )
    return q_TQ


def split_norms_by_parts(
    x_TX: Tensor,
    q_weight_Q: Tensor | None,
    kv_weight_R: Tensor,
    eps: float,
    *,
    positions_T: Tensor,
    frequencies_F: Tensor,
    rope_scale: float,
    blocks_MSC: Tensor,
    block_rows_T: Tensor,
) -> Tensor:
    """The unfused path: the same arithmetic in the same order, a launch for each norm, the rotation and the write, and
    one that puts together what is written."""
    Q, R = 0 if q_weight_Q is None else len(q_weight_Q), len(kv_weight_R)
    P = x_TX.shape[1] - Q - R
    q_TQ, latent_TR, shared_T1P = (x_TX.new_empty(len(x_TX), *sizes) for sizes in ((Q,), (R,), (1, P)))
    if len(x_TX):
        options = dict(num_warps=_num_warps(Q, R), **pdl_options(x_TX))
        for x, weight, y in ((x_TX[:, :Q], q_weight_Q, q_TQ), (x_TX[:, Q : Q + R], kv_weight_R, latent_TR)):
            if weight is not None:
                D = len(weight)
                _rms_norm[(len(x_TX),)](x, weight, y, x.stride(0), eps, D, triton.next_power_of_2(D), **options)
        if len(frequencies_F):
            rotate(x_TX[:, None, Q + R :], shared_T1P, positions_T, frequencies_F, rope_scale)
        else:
            shared_T1P = x_TX[:, None, Q + R :]
        mla_write(torch.cat([latent_TR, shared_T1P.squeeze(1)], dim=-1), blocks_MSC, block_rows_T)
    return q_TQ
