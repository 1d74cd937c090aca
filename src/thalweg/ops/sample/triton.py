"""Sampling in two launches: each program finds the best of a block of the vocabulary, then one program a row the best
of those. Where ranks divide the vocabulary the second launch is over_ranks.cu's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.sample import reference
from thalweg.ops.toolchain.triton_dot import INTERPRETED
from thalweg.ops.toolchain.triton_launch import pdl_options

GOLDEN = tl.constexpr(reference.GOLDEN)
MIX_1 = tl.constexpr(reference.MIX_1)
MIX_2 = tl.constexpr(reference.MIX_2)
LARGEST_UNIFORM = tl.constexpr(reference.LARGEST_UNIFORM)


@triton.jit
def _shift_right(x, BITS: tl.constexpr):
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _splitmix64(x):
    x = x + GOLDEN
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


@triton.jit
def _upper_half(x):
    """The upper 32 of 64 bits as an unsigned number, in fp32: from a register, since of 64 bits it takes four times as
    long."""
    if INTERPRETED:
        return _shift_right(x, 32).to(tl.float32)
    else:
        asm: tl.constexpr = "{ .reg .b32 low, high; mov.b64 {low, high}, $1; cvt.rn.f32.u32 $0, high; }"
        return tl.inline_asm_elementwise(asm, "=f,l", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log(x):
    """By the instruction for base 2, off by 2^-22, of numbers that are neither 0 nor denormal."""
    if INTERPRETED:
        return tl.log(x)
    else:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1) * 0.6931471805599453


@triton.jit
def _gumbel(state):
    """As reference.gumbel, for states that are a row's plus the vocabulary index."""
    u = tl.minimum((_upper_half(_splitmix64(state)) + 0.5) * 2.0**-32, LARGEST_UNIFORM)
    # -log1p(-u): its series where 1 - u would lose u's digits.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * (0.25 + u * 0.2))))
    return -_log(tl.where(u < 0.03125, series, -_log(1.0 - u)))


@triton.jit
def best_of_blocks_kernel(
    logits_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    slots_ptr,
    values_ptr,
    ids_ptr,
    V,
    first,
    logits_stride,
    BLOCK_V: tl.constexpr,
    BY_SLOT: tl.constexpr,
    CHECK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, block = tl.program_id(1), tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits_ptrs = logits_ptr + row.to(tl.int64) * logits_stride + index
    value = tl.load(logits_ptrs, mask=index < V, other=float("-inf")).to(tl.float32)
    if CHECK:
        bad = tl.sum(((value - value != 0.0) & (index < V)).to(tl.int32), 0)
    value = tl.where(value == value, value, float("-inf"))
    entry = tl.load(slots_ptr + row) if BY_SLOT else row
    temperature = tl.load(temperatures_ptr + entry).to(tl.float32)
    if temperature > 0.0:
        state = _splitmix64(_splitmix64(tl.load(seeds_ptr + entry)) + tl.load(positions_ptr + row))
        value = tl.where(index < V, value / temperature + _gumbel(state + first + index), float("-inf"))
    best, where = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    id = first + block * BLOCK_V + where
    if CHECK:  # above any that a row of finite logits has
        best = tl.where(bad > 0, float("inf"), best)
        id = tl.where(bad > 0, -1, id)
    out = row * tl.num_programs(0) + block
    tl.store(values_ptr + out, best)
    tl.store(ids_ptr + out, id)


@triton.jit
def best_of_rows_kernel(values_ptr, ids_ptr, out_ptr, blocks, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.arange(0, BLOCKS)
    value = tl.load(values_ptr + row * blocks + index, mask=index < blocks, other=float("-inf"))
    where = tl.argmax(value, 0, tie_break_left=True)
    tl.store(out_ptr + row, tl.load(ids_ptr + row * blocks + where).to(tl.int64))


def sample(
    logits_RV: Tensor,
    temperatures_R: Tensor,
    seeds_R: Tensor,
    positions_R: Tensor,
    slots_R: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    R = len(logits_RV)
    out_R = torch.empty(R, dtype=torch.int64, device=logits_RV.device)
    if R == 0:
        return out_R
    values, ids = best_of_blocks(logits_RV, temperatures_R, seeds_R, positions_R, slots_R, check=check)
    blocks, pdl = values.shape[1], pdl_options(logits_RV)
    best_of_rows_kernel[(R,)](values, ids, out_R, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=1, **pdl)
    return out_R


def best_of_blocks(
    logits_RV: Tensor,
    temperatures_R: Tensor,
    seeds_R: Tensor,
    positions_R: Tensor,
    slots_R: Tensor | None,
    *,
    check: bool,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Values fp32 and ids int32 [R, blocks]; `first` is the id of the first column."""
    R, V = logits_RV.shape
    block = 2048
    blocks = triton.cdiv(V, block)
    values = torch.empty(R, blocks, dtype=torch.float32, device=logits_RV.device)
    ids = torch.empty(R, blocks, dtype=torch.int32, device=logits_RV.device)
    if R == 0:
        return values, ids
    best_of_blocks_kernel[(blocks, R)](
        logits_RV,
        temperatures_R,
        seeds_R,
        positions_R,
        positions_R if slots_R is None else slots_R,
        values,
        ids,
        V,
        first,
        logits_RV.stride(0),
        BLOCK_V=block,
        BY_SLOT=slots_R is not None,
        CHECK=check,
        num_warps=4,
        **pdl_options(logits_RV),
    )
    return values, ids
