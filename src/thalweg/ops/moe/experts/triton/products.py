"""Sums over tiles of an expert's weights, whatever their scheme: where kernels for plain weights, fp8 and int4 differ.

Pointers to scales are None for weights in x's dtype. With fp8, where a scale goes is the caller's choice: it is applied
once to the products of a block of 128 columns (exact, but these are summed apart); or FOLD: a weight takes it as it is
widened, so that sums run through all columns in one accumulator, which saves registers. What a weight takes then is the
scale over the largest one of its rows, and the sums take that: so nothing leaves the range of the tiles' type, and what
falls below it is 2^-32 of the largest weight of these blocks. With powers of two all of that is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.moe.experts.triton import nibbles
from thalweg.ops.moe.experts.triton.nibbles import GROUP, WORD, column_at, ordered_width
from thalweg.ops.toolchain.triton_dot import INTERPRETED, dot
from thalweg.quant.blocks import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
LARGEST_SCALE = tl.constexpr(2.0**126)  # of which the inverse is a normal number

# Four weights at a time. To fp16 there is an instruction for two.
_TO_FP16 = tl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
mul.rn.f16x2 $0, $0, $3;
mul.rn.f16x2 $1, $1, $4;
}""")
# To bf16: sign, exponent and fraction moved to their places make 2^-120 of a weight, subnormal ones included.
_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b;
prmt.b32 $0, $2, 0, 0x1404;
prmt.b32 $1, $2, 0, 0x3424;
shr.u32 a, $0, 4;
shr.u32 b, $1, 4;
and.b32 a, a, 0x07f007f0;
and.b32 b, b, 0x07f007f0;
lop3.b32 $0, $0, 0x80008000, a, 0xea;
lop3.b32 $1, $1, 0x80008000, b, 0xea;
mul.rn.bf16x2 $0, $0, $3;
mul.rn.bf16x2 $1, $1, $4;
}""")


@triton.jit
def silu_and_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _widen(q, dtype: tl.constexpr):
    """e4m3 to `dtype`, exactly. To bf16 by way of fp32: straight, it is one conversion an element at 1/8 the rate."""
    if dtype == tl.bfloat16:
        return q.to(tl.float32).to(tl.bfloat16)
    else:
        return q.to(dtype)


@triton.jit
def _widen_and_scale(q, factor, dtype: tl.constexpr):
    """q * factor in `dtype`, both rounded to it; factor is below 4, of a shape that broadcasts."""
    if INTERPRETED or dtype == tl.float32:
        return (q.to(tl.float32) * factor).to(dtype)
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _TO_FP16, "=&r,=&r,r,r,r", [q, factor.to(tl.float16)], tl.float16, is_pure=True, pack=4
        )
    else:
        factor *= 2.0**120
        return tl.inline_asm_elementwise(
            _TO_BF16, "=&r,=&r,r,r,r", [q, factor.to(tl.bfloat16)], tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def _largest(s_ptr, blocks: tl.constexpr):
    """(the largest of a row's scales, its inverse)"""
    largest = tl.load(s_ptr)
    for c in tl.range(1, blocks):
        largest = tl.maximum(largest, tl.load(s_ptr + c))
    largest = tl.minimum(largest, LARGEST_SCALE)
    return largest, tl.div_rn(1.0, largest)


@triton.jit
def _load(ptrs, at, columns, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """A tile of the columns `columns` from `at` on, of COLUMNS in all; zero past them."""
    if COLUMNS % STEP == 0:
        tile = tl.load(ptrs + at + columns)
    else:
        tile = tl.load(ptrs + at + columns, mask=at + columns < COLUMNS, other=0.0)
    return tile


@triton.jit
def _load_scale(s_ptr, s_next, at, ROWS: tl.constexpr):
    """Of the weights' columns from `at` on, of ROWS rows: more than BLOCK lie in two rows of blocks."""
    if s_ptr is None:
        scale = 1.0
    elif ROWS <= BLOCK:
        scale = tl.load(s_ptr + at // BLOCK)
    else:
        both = tl.load(s_ptr + at // BLOCK), tl.load(s_ptr + s_next + at // BLOCK)
        scale = tl.where(tl.arange(0, ROWS) < BLOCK, both[0], both[1])[None, :]
    return scale


@triton.jit
def _add_product(acc, x, w, scale, factor, FP8: tl.constexpr, FOLD: tl.constexpr):
    if not FP8:
        acc = tl.dot(x, w, acc, input_precision="ieee")
    elif FOLD:
        acc += dot(x, _widen_and_scale(w, scale * factor, x.dtype))
    else:
        acc += dot(x, _widen(w, x.dtype)) * scale
    return acc


@triton.jit
def _gate_up_sums(
    x_ptrs,  # [rows, 1], at x's first column
    w_ptrs,  # [1, columns of gate], at w's first column
    s_ptr,  # of the row of blocks that these columns of gate lie in, or None
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK if there are scales
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """(x @ gate.T, x @ up.T) in fp32, up's weights I rows behind gate's."""
    FP8: tl.constexpr = s_ptr is not None
    d = tl.arange(0, BLOCK_D)
    gate_factor, up_factor, s_up_ptr = 1.0, 1.0, None
    if FP8:
        blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
        s_up_ptr = s_ptr + (I + BLOCK - 1) // BLOCK * blocks_d
        if FOLD:
            gate_largest, gate_factor = _largest(s_ptr, blocks_d)
            up_largest, up_factor = _largest(s_up_ptr, blocks_d)
    gate = tl.zeros([x_ptrs.shape[0], w_ptrs.shape[1]], tl.float32)
    up = tl.zeros([x_ptrs.shape[0], w_ptrs.shape[1]], tl.float32)
    for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        gate_scale = _load_scale(s_ptr, 0, at, w_ptrs.shape[1])
        up_scale = _load_scale(s_up_ptr, 0, at, w_ptrs.shape[1])
        x = _load(x_ptrs, at, d[None, :], D, BLOCK_D)
        w_gate = _load(w_ptrs, at, d[:, None], D, BLOCK_D)
        w_up = _load(w_ptrs + I * D, at, d[:, None], D, BLOCK_D)
        gate = _add_product(gate, x, w_gate, gate_scale, gate_factor, FP8, FOLD)
        up = _add_product(up, x, w_up, up_scale, up_factor, FP8, FOLD)
    if FP8 and FOLD:
        gate *= gate_largest
        up *= up_largest
    return gate, up


@triton.jit
def _down_sums(
    h_ptrs,  # [rows, 1], at h's first column
    w_ptrs,  # [1, columns of y], at w's first column
    s_ptr,  # of the row of blocks that these columns of y lie in, or None
    s_next,  # how many scales further the next row of blocks is, for twice BLOCK columns of y
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides BLOCK if there are scales
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """h @ down.T in fp32."""
    FP8: tl.constexpr = s_ptr is not None
    i = tl.arange(0, BLOCK_I)
    factor = 1.0
    if FP8 and FOLD:
        largest, factor = _largest(s_ptr, (I + BLOCK - 1) // BLOCK)
    acc = tl.zeros([h_ptrs.shape[0], w_ptrs.shape[1]], tl.float32)
    for at in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        scale = _load_scale(s_ptr, s_next, at, w_ptrs.shape[1])
        h = _load(h_ptrs, at, i[None, :], I, BLOCK_I)
        w = _load(w_ptrs, at, i[:, None], I, BLOCK_I)
        acc = _add_product(acc, h, w, scale, factor, FP8, FOLD)
    if FP8 and FOLD:
        acc *= largest
    return acc


@triton.jit
def gate_up_sums(
    x_ptrs,  # [tokens, 1], at x's first column
    w_ptr,  # [E, 2I, D], or its words
    s_ptr,  # by scheme: [E, 2 * blocks of I, blocks of D], [E, 2I, groups of D], or None
    expert,
    first,
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides BLOCK if scales are of blocks
    BLOCK_D: tl.constexpr,  # divides BLOCK if scales are of blocks, a multiple of ORDERED over words
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """(x @ gate.T, x @ up.T) in fp32, [tokens, BLOCK_I], of an expert's rows at the places from `first` on of h."""
    rows = first + tl.arange(0, BLOCK_I)
    expert = expert.to(tl.int64)
    if w_ptr.dtype.element_ty == tl.int32:
        row = (expert * (2 * I) + tl.minimum(column_at(rows), I - 1))[:, None]
        w_ptrs = w_ptr + row * (D // WORD)
        s_ptrs = s_ptr + row * ((D + GROUP - 1) // GROUP)
        gate, up = nibbles.gate_up_sums(x_ptrs, w_ptrs, s_ptrs, D, I, BLOCK_D, STAGES)
    else:
        w_ptrs = w_ptr + expert * (2 * I * D) + tl.minimum(rows, I - 1)[None, :] * D
        if s_ptr is not None:
            blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
            s_ptr += (expert * (2 * blocks_i) + first // BLOCK) * ((D + BLOCK - 1) // BLOCK)
        gate, up = _gate_up_sums(x_ptrs, w_ptrs, s_ptr, D, I, BLOCK_D, STAGES, FOLD)
    return gate, up


@triton.jit
def down_sums(
    h_ptrs,  # [tokens, 1], at h's first place
    w_ptr,  # [E, D, I], or its words
    s_ptr,  # by scheme: [E, blocks of D, blocks of I], [E, D, groups of I], or None
    expert,
    first,
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK if scales are of blocks, or is twice as much
    BLOCK_I: tl.constexpr,  # as BLOCK_D of gate_up
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """h @ down.T in fp32, [tokens, BLOCK_D], of an expert's rows from `first` on."""
    rows = tl.minimum(first + tl.arange(0, BLOCK_D), D - 1)
    expert = expert.to(tl.int64)
    if w_ptr.dtype.element_ty == tl.int32:
        row = (expert * D + rows)[:, None]
        w_ptrs = w_ptr + row * (I // WORD)
        y = nibbles.down_sums(h_ptrs, w_ptrs, s_ptr + row * ((I + GROUP - 1) // GROUP), I, BLOCK_I, STAGES)
    else:
        w_ptrs = w_ptr + expert * (D * I) + rows[None, :] * I
        s_next = 0
        if s_ptr is not None:
            blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
            blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
            row = first // BLOCK
            s_ptr += (expert * blocks_d + row) * blocks_i
            s_next = (tl.minimum(row + 1, blocks_d - 1) - row) * blocks_i
        y = _down_sums(h_ptrs, w_ptrs, s_ptr, s_next, I, BLOCK_I, STAGES, FOLD)
    return y


@triton.constexpr_function
def h_width(weights: tl.dtype, I: int) -> int:
    """Places of a row of h, by the type of the weights."""
    return ordered_width(I) if weights == tl.int32 else I


@triton.jit
def store_h(h_ptr, gate, up, row, here, first, w_ptr, I: tl.constexpr):
    """silu(gate) * up as rows of h, the places from `first` on."""
    places = first + tl.arange(0, gate.shape[1])
    h = silu_and_mul(gate, up)
    column = places
    if w_ptr.dtype.element_ty == tl.int32:
        column = column_at(places)
        h = tl.where((column < I)[None, :], h, 0.0)
    width: tl.constexpr = h_width(w_ptr.dtype.element_ty, I)
    inside = here[:, None] & (places < width)[None, :]
    tl.store(h_ptr + row[:, None] * width + places[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


def scheme_of(weights: Tensor, scales: Tensor | None = None) -> str:
    """The scheme's name, of its tensors."""
    return "none" if scales is None else "int4" if weights.dtype == torch.int32 else "fp8"
