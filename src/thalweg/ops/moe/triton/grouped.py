"""Routed experts for the many tokens of a prefill: a sort of the (token, expert) pairs by expert, two grouped matrix
products, and a token's weighted sum. Five launches and a fill; nothing waits for the device.

The sort takes a place in its expert's list for each pair with an atomic counter, so the order within an expert changes
from run to run. Nothing else does: a pair's products do not depend on its neighbours, and the sum has one fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICE = 16384  # tokens at a time: what is kept in between is at most this many rows for each expert of a token


@triton.jit(do_not_specialize=["pairs"])
def rank_kernel(ids_ptr, counts_ptr, ranks_ptr, pairs, K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """Each pair's number among those of its expert. Every token is with the shared experts, so it is its own number."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shared = pair % K >= K - SHARED
    expert = tl.load(ids_ptr + pair, mask=pair < pairs, other=0)
    rank = tl.atomic_add(counts_ptr + expert, 1, mask=(pair < pairs) & ~shared, sem="relaxed")
    tl.store(ranks_ptr + pair, tl.where(shared, pair // K, rank), mask=pair < pairs)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def place_kernel(
    ids_ptr,
    counts_ptr,
    ranks_ptr,
    sorted_ptr,  # [T * K] pairs by expert
    blocks_ptr,  # [blocks, 3] expert, first of sorted, how many (0: no block)
    pairs,
    blocks,
    E: tl.constexpr,
    E2: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    expert = tl.arange(0, E2)
    counts = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    counts = tl.where((expert >= E - SHARED) & (expert < E), pairs // K, counts)
    starts = tl.cumsum(counts, 0) - counts

    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    expert_of_pair = tl.load(ids_ptr + pair, mask=inside, other=0).to(tl.int32)
    rank = tl.load(ranks_ptr + pair, mask=inside, other=0)
    tl.store(sorted_ptr + tl.gather(starts, expert_of_pair, 0) + rank, pair, mask=inside)

    ends = tl.cumsum((counts + ROWS - 1) // ROWS, 0)  # of an expert's blocks
    block = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    past = ends[None, :] <= block[:, None]
    owner = tl.minimum(tl.sum(past.to(tl.int32), 1), E2 - 1)
    before = tl.max(tl.where(past, ends[None, :], 0), 1)
    done = (block - before) * ROWS
    rows = tl.minimum(tl.maximum(tl.gather(counts, owner, 0) - done, 0), ROWS)
    tl.store(blocks_ptr + 3 * block, owner, mask=block < blocks)
    tl.store(blocks_ptr + 3 * block + 1, tl.gather(starts, owner, 0) + done, mask=block < blocks)
    tl.store(blocks_ptr + 3 * block + 2, rows, mask=block < blocks)


@triton.jit
def _gate_up_tile(
    x_ptr,
    sorted_ptr,
    w_ptr,
    h_ptr,
    first,
    count,
    i,
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of `count` sorted pairs from `first` on, the columns i of it, from one expert's weights."""
    m = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64) // K
    x_ptrs = x_ptr + token[:, None] * x_stride + d[None, :]
    w_ptrs = w_ptr + tl.minimum(i, I - 1)[None, :] * D + d[:, None]
    gate = tl.zeros([ROWS, BLOCK_I], tl.float32)
    up = tl.zeros([ROWS, BLOCK_I], tl.float32)
    for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        if D % BLOCK_D == 0:
            x = tl.load(x_ptrs + at)
            w_gate = tl.load(w_ptrs + at)
            w_up = tl.load(w_ptrs + at + I * D)
        else:
            x = tl.load(x_ptrs + at, mask=at + d[None, :] < D, other=0.0)
            w_gate = tl.load(w_ptrs + at, mask=at + d[:, None] < D, other=0.0)
            w_up = tl.load(w_ptrs + at + I * D, mask=at + d[:, None] < D, other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    h = gate * tl.sigmoid(gate) * up
    h_ptrs = h_ptr + (first + m).to(tl.int64)[:, None] * I + i[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=(m < count)[:, None] & (i < I)[None, :])


@triton.jit
def gate_up_grouped_kernel(
    x_ptr,
    sorted_ptr,
    blocks_ptr,
    w_ptr,  # [E, 2I, D]
    h_ptr,  # [T * K, I], by expert
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,  # a tile of as many rows where they are enough
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    w_ptr += tl.load(blocks_ptr + 3 * block).to(tl.int64) * (2 * I * D)
    first = tl.load(blocks_ptr + 3 * block + 1)
    i = (tl.program_id(0) % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    if count <= TAIL:
        _gate_up_tile(
            x_ptr, sorted_ptr, w_ptr, h_ptr, first, count, i, x_stride, D, I, K, TAIL, BLOCK_I, BLOCK_D, STAGES
        )
    else:
        _gate_up_tile(
            x_ptr, sorted_ptr, w_ptr, h_ptr, first, count, i, x_stride, D, I, K, ROWS, BLOCK_I, BLOCK_D, STAGES
        )


@triton.jit
def _down_tile(
    h_ptr,
    sorted_ptr,
    w_ptr,
    y_ptr,
    first,
    count,
    d,
    D: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of `count` sorted pairs from `first` on, the columns d of it, from one expert's weights."""
    m = tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK_I)
    h_ptrs = h_ptr + (first + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * I + i[None, :]
    w_ptrs = w_ptr + tl.minimum(d, D - 1)[None, :] * I + i[:, None]
    acc = tl.zeros([ROWS, d.shape[0]], tl.float32)
    for at in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        if I % BLOCK_I == 0:
            h = tl.load(h_ptrs + at)
            w = tl.load(w_ptrs + at)
        else:
            h = tl.load(h_ptrs + at, mask=at + i[None, :] < I, other=0.0)
            w = tl.load(w_ptrs + at, mask=at + i[:, None] < I, other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    pair = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64)
    y_ptrs = y_ptr + pair[:, None] * D + d[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m < count)[:, None] & (d < D)[None, :])


@triton.jit
def down_grouped_kernel(
    h_ptr,
    sorted_ptr,
    blocks_ptr,
    w_ptr,  # [E, D, I]
    y_ptr,  # [T * K, D], by token
    D: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    w_ptr += tl.load(blocks_ptr + 3 * block).to(tl.int64) * (D * I)
    first = tl.load(blocks_ptr + 3 * block + 1)
    d = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    if count <= TAIL:
        _down_tile(h_ptr, sorted_ptr, w_ptr, y_ptr, first, count, d, D, I, TAIL, BLOCK_I, STAGES)
    else:
        _down_tile(h_ptr, sorted_ptr, w_ptr, y_ptr, first, count, d, D, I, ROWS, BLOCK_I, STAGES)


@triton.jit
def weighted_sum_kernel(y_ptr, weights_ptr, out_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(K):
        y = tl.load(y_ptr + (token * K + j) * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + token * K + j).to(tl.float32) * y
    tl.store(out_ptr + token * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def experts_grouped(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    """Op "experts" for any T. A pair's output is rounded to x's dtype before the sum."""
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    for start in range(0, x_TD.shape[0], SLICE):
        span = slice(start, start + SLICE)
        _experts(x_TD[span], weights_Tk[span], ids_Tk[span], w_gate_up_E2ID, w_down_EDI, num_shared, y_TD[span])
    return y_TD if residual_TD is None else residual_TD + y_TD


def _experts(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    num_shared: int,
    out_TD: Tensor,
) -> None:
    (T, K), (E, D, I), device = ids_Tk.shape, w_down_EDI.shape, x_TD.device
    rows = rows_per_block(T * K, E)
    sorted_P, blocks_N3 = sort_pairs(ids_Tk, E, num_shared, rows)
    blocks = blocks_N3.shape[0]
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=device)
    y_PD = torch.empty(T * K, D, dtype=x_TD.dtype, device=device)
    tile = tile_options(x_TD.dtype, rows)
    gate_up_grouped_kernel[(blocks * triton.cdiv(I, 128),)](
        x_TD,
        sorted_P,
        blocks_N3,
        w_gate_up_E2ID,
        h_PI,
        x_TD.stride(0),
        D=D,
        I=I,
        K=K,
        ROWS=rows,
        TAIL=tile["tail"],
        BLOCK_I=128,
        BLOCK_D=tile["depth"],
        STAGES=tile["stages"],
        num_warps=tile["warps"],
    )
    down_grouped_kernel[(blocks * triton.cdiv(D, 256),)](
        h_PI,
        sorted_P,
        blocks_N3,
        w_down_EDI,
        y_PD,
        D=D,
        I=I,
        ROWS=rows,
        TAIL=tile["tail"],
        BLOCK_D=256,
        BLOCK_I=tile["depth"],
        STAGES=tile["stages"],
        num_warps=tile["warps"],
    )
    block = min(1024, triton.next_power_of_2(D))
    weighted_sum_kernel[(T, triton.cdiv(D, block))](y_PD, weights_Tk, out_TD, D, K, block, num_warps=4)


def rows_per_block(pairs: int, experts: int) -> int:
    """Rows of a tile: an expert's last one is partly empty, and a tile of fewer reads the weights more often."""
    return 64 if pairs <= 96 * experts else 128


def tile_options(dtype: torch.dtype, rows: int) -> dict[str, int]:
    if dtype == torch.float32:  # no tensor cores: a small tile, for registers
        return {"depth": 16, "stages": 1, "warps": 8, "tail": 16}
    return {"depth": 64, "stages": 4, "warps": 8 if rows == 128 else 4, "tail": 64 if rows == 128 else 32}


def sort_pairs(ids_Tk: Tensor, experts: int, num_shared: int, rows: int) -> tuple[Tensor, Tensor]:
    """(sorted_P, blocks_N3), both int32: the pairs by expert, and blocks of at most `rows` of them of one expert.

    A block is (expert, its first place in sorted_P, how many). There are as many as could be needed; the rest have 0.
    """
    P, K, device = ids_Tk.numel(), ids_Tk.shape[1], ids_Tk.device
    counts_E = torch.zeros(experts, dtype=torch.int32, device=device)
    ranks_P, sorted_P = (torch.empty(P, dtype=torch.int32, device=device) for _ in range(2))
    blocks = P // rows + min(experts, P)
    blocks_N3 = torch.empty(blocks, 3, dtype=torch.int32, device=device)
    rank_kernel[(triton.cdiv(P, 256),)](ids_Tk, counts_E, ranks_P, P, K, num_shared, 256, num_warps=4)
    programs = triton.cdiv(P, 512)
    place_kernel[(programs,)](
        ids_Tk,
        counts_E,
        ranks_P,
        sorted_P,
        blocks_N3,
        P,
        blocks,
        E=experts,
        E2=triton.next_power_of_2(experts + 1),
        K=K,
        SHARED=num_shared,
        ROWS=rows,
        BLOCK=512,
        BLOCK_B=max(16, triton.next_power_of_2(triton.cdiv(blocks, programs))),
        num_warps=4,
    )
    return sorted_P, blocks_N3
