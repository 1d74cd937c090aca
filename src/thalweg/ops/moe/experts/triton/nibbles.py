"""Weights in int4 as operands of a product: words are widened in registers, which the matrix unit takes as they are.

A word has eight neighbours of a row, and a thread that holds words has whole ones. So within each block of 128 columns
an operand has them nibble by nibble: first the lowest ones of all 16 words, then the next. The other operand has its
columns in the same order: x is brought to it by a launch ahead, h is written in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.toolchain.triton_dot import INTERPRETED, done, dot
from thalweg.quant.int4 import GROUP as _GROUP
from thalweg.quant.int4 import WORD as _WORD

GROUP, WORD = tl.constexpr(_GROUP), tl.constexpr(_WORD)
ORDERED = tl.constexpr(128)  # columns that change places with one another

# Words a and b give eight pairs of bf16, of their first nibbles and so on: 0x4300 | n is 128 + n, less 136 is exact.
_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, t, mask, magic, much;
mov.b32 mask, 0x000f000f;
mov.b32 magic, 0x43004300;
mov.b32 much, 0x43084308;
prmt.b32 a, $8, $9, 0x5410;
prmt.b32 b, $8, $9, 0x7632;
lop3.b32 $0, a, mask, magic, 0xea;
shr.u32 t, a, 4;
lop3.b32 $1, t, mask, magic, 0xea;
shr.u32 t, a, 8;
lop3.b32 $2, t, mask, magic, 0xea;
shr.u32 t, a, 12;
lop3.b32 $3, t, mask, magic, 0xea;
lop3.b32 $4, b, mask, magic, 0xea;
shr.u32 t, b, 4;
lop3.b32 $5, t, mask, magic, 0xea;
shr.u32 t, b, 8;
lop3.b32 $6, t, mask, magic, 0xea;
shr.u32 t, b, 12;
lop3.b32 $7, t, mask, magic, 0xea;
sub.rn.bf16x2 $0, $0, much;
sub.rn.bf16x2 $1, $1, much;
sub.rn.bf16x2 $2, $2, much;
sub.rn.bf16x2 $3, $3, much;
sub.rn.bf16x2 $4, $4, much;
sub.rn.bf16x2 $5, $5, much;
sub.rn.bf16x2 $6, $6, much;
sub.rn.bf16x2 $7, $7, much;
mul.rn.bf16x2 $0, $0, $10;
mul.rn.bf16x2 $1, $1, $10;
mul.rn.bf16x2 $2, $2, $10;
mul.rn.bf16x2 $3, $3, $10;
mul.rn.bf16x2 $4, $4, $10;
mul.rn.bf16x2 $5, $5, $10;
mul.rn.bf16x2 $6, $6, $10;
mul.rn.bf16x2 $7, $7, $10;
}""")


@triton.jit
def column_at(place):
    """Which column stands at a place of the order above."""
    within = place % ORDERED
    return place - within + within % 16 * WORD + within // 16


@triton.constexpr_function
def ordered_width(columns: int) -> int:
    """Places that `columns` columns take; what is not a column is zero."""
    return -(-columns // 128) * 128


@triton.jit
def _nibble(words, scales, j: tl.constexpr, dtype: tl.constexpr):
    return (((words >> 4 * j & 15) - 8).to(tl.float32) * scales.to(tl.float32)).to(dtype)


@triton.jit
def _widened(words, scales, dtype: tl.constexpr):
    """Tiles of the words' eight nibbles, (nibble - 8) * scale rounded once to `dtype`."""
    if INTERPRETED or dtype != tl.bfloat16:
        tiles = ()
        for j in tl.static_range(8):
            tiles = tiles + (_nibble(words, scales, j, dtype),)
        return tiles
    else:
        return tl.inline_asm_elementwise(
            _TO_BF16,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [words, scales],
            (tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _weights(w_ptrs, s_ptrs, at, COLUMNS: tl.constexpr, STEP: tl.constexpr, dtype: tl.constexpr):
    """[rows, STEP] of the columns from `at` on, ordered; zero past the last."""
    rows: tl.constexpr = w_ptrs.shape[0]
    word = at // WORD + tl.arange(0, STEP // WORD)
    group = at // GROUP + tl.arange(0, STEP // GROUP)
    if COLUMNS % STEP == 0:
        words = tl.load(w_ptrs + word[None, :])
        scales = tl.load(s_ptrs + group[None, :])
    else:
        words = tl.load(w_ptrs + word[None, :], mask=word[None, :] < COLUMNS // WORD, other=0)
        scales = tl.load(s_ptrs + group[None, :], mask=group[None, :] * GROUP < COLUMNS, other=0.0)
    scales = tl.broadcast_to(scales[:, :, None], [rows, STEP // GROUP, GROUP // WORD])
    t = _widened(words, tl.reshape(scales, [rows, STEP // WORD]), dtype)
    even = tl.join(tl.join(t[0], t[4]), tl.join(t[2], t[6]))
    odd = tl.join(tl.join(t[1], t[5]), tl.join(t[3], t[7]))
    both = tl.reshape(tl.join(even, odd), [rows, STEP // ORDERED, 16, 2, 2, 2])
    return tl.reshape(tl.permute(both, (0, 1, 3, 4, 5, 2)), [rows, STEP])


@triton.jit
def _operand(x_ptrs, at, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    place = at + tl.arange(0, STEP)
    if ordered_width(COLUMNS) % STEP == 0:
        x = tl.load(x_ptrs + place[None, :])
    else:
        x = tl.load(x_ptrs + place[None, :], mask=place[None, :] < ordered_width(COLUMNS), other=0.0)
    return tl.trans(x)


@triton.jit
def _add(acc, w, x):
    if INTERPRETED:
        return acc + dot(w, x)
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def gate_up_sums(
    x_ptrs,  # [tokens, 1], at the first place of x, ordered
    w_ptrs,  # [rows of gate, 1], at their first words
    s_ptrs,  # [rows of gate, 1], at their first scales
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a multiple of ORDERED
    STAGES: tl.constexpr,
):
    """(x @ gate.T, x @ up.T) in fp32, up's weights I rows behind gate's."""
    gate = tl.zeros([w_ptrs.shape[0], x_ptrs.shape[0]], tl.float32)
    up = tl.zeros([w_ptrs.shape[0], x_ptrs.shape[0]], tl.float32)
    up_words: tl.constexpr = I * (D // WORD)
    up_scales: tl.constexpr = I * ((D + GROUP - 1) // GROUP)
    for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        x = _operand(x_ptrs, at, D, BLOCK_D)
        gate = _add(gate, _weights(w_ptrs, s_ptrs, at, D, BLOCK_D, x.dtype), x)
        up = _add(up, _weights(w_ptrs + up_words, s_ptrs + up_scales, at, D, BLOCK_D, x.dtype), x)
        gate, up = done(gate), done(up)
    return tl.trans(gate), tl.trans(up)


@triton.jit
def down_sums(h_ptrs, w_ptrs, s_ptrs, I: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr):
    """h @ down.T in fp32, of h ordered."""
    acc = tl.zeros([w_ptrs.shape[0], h_ptrs.shape[0]], tl.float32)
    for at in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        h = _operand(h_ptrs, at, I, BLOCK_I)
        acc = done(_add(acc, _weights(w_ptrs, s_ptrs, at, I, BLOCK_I, h.dtype), h))
    return tl.trans(acc)


@triton.jit
def store_ordered_row(x_ptr, ordered_ptr, token, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    at = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + token * x_stride + at, mask=at < D, other=0.0)
    x = tl.permute(tl.reshape(x, [BLOCK_D // ORDERED, ORDERED // WORD, WORD]), (0, 2, 1))
    tl.store(ordered_ptr + token * ordered_width(D) + at, tl.reshape(x, [BLOCK_D]), mask=at < ordered_width(D))


@triton.jit
def order_kernel(x_ptr, ordered_ptr, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    store_ordered_row(x_ptr, ordered_ptr, tl.program_id(0).to(tl.int64), x_stride, D, BLOCK_D)


def in_order(x_TD: Tensor) -> Tensor:
    """x with its columns ordered."""
    T, D = x_TD.shape
    ordered = torch.empty(T, ordered_width(D), dtype=x_TD.dtype, device=x_TD.device)
    block = max(128, triton.next_power_of_2(D))
    order_kernel[(T,)](x_TD, ordered, x_TD.stride(0), D=D, BLOCK_D=block, num_warps=8)
    return ordered


@triton.jit
def pairs_order_kernel(x_ptr, ordered_ptr, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < D, other=0.0)
    x = tl.permute(tl.reshape(x, [BLOCK_D // 128, 4, 4, 2, 2, 2]), (0, 2, 4, 5, 1, 3))
    tl.store(ordered_ptr + row * D + at, tl.reshape(x, [BLOCK_D]), mask=at < D)


def in_order_of_pairs(x_TD: Tensor) -> Tensor:
    """x with the columns of every 128 as the kernels of matrix_int4.cu take them; 128 divides D."""
    T, D = x_TD.shape
    ordered_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    block = max(128, triton.next_power_of_2(D))
    pairs_order_kernel[(T,)](x_TD, ordered_TD, x_TD.stride(0), D=D, BLOCK_D=block, num_warps=8)
    return ordered_TD
