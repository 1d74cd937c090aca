"""Rotation of neighbouring pairs: the arithmetic, which other kernels of latent attention share, and a launch of it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def cos_and_sin(position_N, frequencies_ptr, rope_scale, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of the angles of P / 2 pairs, scaled, fp32 [N, BLOCK_P / 2]."""
    f = tl.arange(0, BLOCK_P // 2)
    frequency_F = tl.load(frequencies_ptr + f, mask=f < P // 2, other=0.0)
    angle_NF = position_N.to(tl.float32)[:, None] * frequency_F[None, :]
    return tl.cos(angle_NF) * rope_scale, tl.sin(angle_NF) * rope_scale


@triton.jit
def turned(x_NP, cos_NF, sin_NF, N: tl.constexpr, BLOCK_P: tl.constexpr):
    """x [N, BLOCK_P] with its pairs (2 i, 2 i + 1) rotated, fp32."""
    even_NF, odd_NF = tl.split(tl.reshape(x_NP.to(tl.float32), [N, BLOCK_P // 2, 2]))
    # Said outright, not left to the compiler: all kernels that rotate give one result, bit for bit.
    first_NF = tl.fma(even_NF, cos_NF, -(odd_NF * sin_NF))
    second_NF = tl.fma(odd_NF, cos_NF, even_NF * sin_NF)
    return tl.reshape(tl.join(first_NF, second_NF), [N, BLOCK_P])


@triton.jit
def rotate_heads(
    x_ptr,
    y_ptr,
    position_ptr,
    frequencies_ptr,
    x_stride_h,
    y_stride_h,
    rope_scale,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """The heads of one token, of which x_ptr and y_ptr are the first's P values. With PDL the wait is in here."""
    h = tl.arange(0, BLOCK_H)
    p = tl.arange(0, BLOCK_P)
    inside = (h < H)[:, None] & (p < P)[None, :]
    position_1 = tl.load(position_ptr + tl.arange(0, 1))
    cos_1F, sin_1F = cos_and_sin(position_1, frequencies_ptr, rope_scale, P, BLOCK_P)
    if PDL:
        gdc_wait()
    x_HP = tl.load(x_ptr + h[:, None] * x_stride_h + p[None, :], mask=inside, other=0.0)
    y_HP = turned(x_HP, cos_1F, sin_1F, BLOCK_H, BLOCK_P)
    tl.store(y_ptr + h[:, None] * y_stride_h + p[None, :], y_HP.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def rotate_kernel(
    x_ptr,
    y_ptr,
    positions_ptr,
    frequencies_ptr,
    x_stride_t,
    x_stride_h,
    y_stride_t,
    y_stride_h,
    rope_scale,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    rotate_heads(
        x_ptr + token * x_stride_t,
        y_ptr + token * y_stride_t,
        positions_ptr + token,
        frequencies_ptr,
        x_stride_h,
        y_stride_h,
        rope_scale,
        H,
        P,
        BLOCK_H,
        BLOCK_P,
        PDL,
    )


def rotate(x_THP: Tensor, y_THP: Tensor, positions_T: Tensor, frequencies_F: Tensor, rope_scale: float) -> None:
    """x rotated into y, which may be x. Both have a unit last stride."""
    T, H, P = x_THP.shape
    if x_THP.numel():
        rotate_kernel[(T,)](
            x_THP,
            y_THP,
            positions_T,
            frequencies_F,
            x_THP.stride(0),
            x_THP.stride(1),
            y_THP.stride(0),
            y_THP.stride(1),
            rope_scale,
            H=H,
            P=P,
            BLOCK_H=triton.next_power_of_2(H),
            BLOCK_P=triton.next_power_of_2(P),
            num_warps=4 if H * P >= 1024 else 1,
            **pdl_options(x_THP),
        )


def mla_rope(q_THX: Tensor, *, positions_T: Tensor, frequencies_F: Tensor, rope_scale: float) -> None:
    turning_THP = q_THX[..., q_THX.shape[-1] - 2 * len(frequencies_F) :]
    rotate(turning_THP, turning_THP, positions_T, frequencies_F, rope_scale)
