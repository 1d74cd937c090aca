"""conv1d_prefill as one Triton kernel: a program takes some channels of a piece of one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.delta.conv1d import PIECE
from thalweg.ops.host_tables import Boundaries, pieces


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "saves_ptr", "slots_ptr"])
def conv1d_prefill_kernel(
    x_ptr,
    state_ptr,
    slots_ptr,
    weight_ptr,
    y_ptr,
    pieces_ptr,
    offsets_ptr,
    saves_ptr,
    x_stride,
    C,
    W: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sequence = tl.load(pieces_ptr + 2 * tl.program_id(0))
    first = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    start = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    state_ptrs = state_ptr + tl.load(slots_ptr + sequence) * W * C + c
    # The piece's inputs and the W before them, all on their way at once. Those before the sequence's start are what
    # its slot remembers, as rows start - W .. start - 1.
    rows = ()
    for j in tl.static_range(PIECE + W):
        row = first + (j - W)
        x = tl.load(x_ptr + row * x_stride + c, mask=inside & (row >= start) & (row < end), other=0.0)
        if j < W:
            old = tl.load(state_ptrs + (row - start + W) * C, mask=inside & (row < start), other=0.0)
            x = tl.where(row < start, old.to(x.dtype), x)
        rows = rows + (x,)
    taps = ()
    for w in tl.static_range(W + 1):
        taps = taps + (tl.load(weight_ptr + c * (W + 1) + w, mask=inside, other=0.0).to(tl.float32),)
    for j in tl.static_range(PIECE):
        y = tl.zeros([BLOCK_C], tl.float32)
        for w in tl.static_range(W + 1):
            y += rows[j + w].to(tl.float32) * taps[w]
        y = y * tl.sigmoid(y)
        tl.store(y_ptr + (first + j) * C + c, y.to(y_ptr.dtype.element_ty), mask=inside & (first + j < end))
    save = tl.load(saves_ptr + tl.program_id(0)).to(tl.int64)
    if save > 0:
        for w in tl.static_range(W):
            new = rows[PIECE + w].to(state_ptr.dtype.element_ty)
            tl.store(state_ptr + (save * W + w) * C + c, new, mask=inside)
    if first == start:
        # Only this program reads the slot, so it may move it on: all rows are read before the first is written.
        tl.debug_barrier()
        for w in tl.static_range(W):
            last = end - W + w
            if last >= start:
                new = tl.load(x_ptr + last * x_stride + c, mask=inside, other=0.0).to(state_ptr.dtype.element_ty)
            else:
                new = tl.load(state_ptrs + (last - start + W) * C, mask=inside, other=0.0)
            # Row w takes what was in a later row, or an input: going up, nothing is overwritten before it is read.
            tl.debug_barrier()
            tl.store(state_ptrs + w * C, new, mask=inside)


def conv1d_prefill(
    x_TC: Tensor,
    state_NWC: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    weight_CW: Tensor,
    *,
    boundaries: Boundaries = (),
) -> Tensor:
    T, C = x_TC.shape
    W = state_NWC.shape[1]
    x_TC = x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
    y_TC = torch.empty(T, C, dtype=x_TC.dtype, device=x_TC.device)
    if T:
        cut = pieces(offsets, PIECE, x_TC.device, boundaries)
        block = 512
        conv1d_prefill_kernel[(cut.num, triton.cdiv(C, block))](
            x_TC,
            state_NWC,
            slots_B,
            weight_CW,
            y_TC,
            cut.pieces_N2,
            cut.offsets_B1,
            cut.saves_N,
            x_TC.stride(0),
            C,
            W,
            PIECE,
            block,
            num_warps=4,
        )
    return y_TC
