"""Which (token, expert) pairs go with which expert.

For a few tokens a program finds its expert's pairs by scanning all ids: in registers, or into lists that the products
read. For many tokens pairs are sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.experts.sort import Groups, most_blocks
from thalweg.ops.moe.experts.triton.half import store_half_row, store_narrow_row
from thalweg.ops.moe.experts.triton.nibbles import ordered_width, store_ordered_row
from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def expert_of_group(ids_ptr, group, pairs, E: tl.constexpr, BY_PAIR: tl.constexpr):
    """The expert of a group: a group is an expert, or with BY_PAIR a pair that may stand for its expert.

    The last come first: shared experts, chosen by every token, have the most work.
    """
    if BY_PAIR:
        expert = tl.load(ids_ptr + pairs - 1 - group, cache_modifier=".cg").to(tl.int32)
    else:
        expert = E - 1 - group
    return expert


@triton.jit
def _scan(ids_ptr, start, pairs, expert, count, BLOCK_P: tl.constexpr):
    """A step of the search for the pairs that chose `expert`, of which there were `count` before: (some pairs, whether
    each did, its number among those that did). Ids are not read from L1, which may hold what was there before."""
    pair = start + tl.arange(0, BLOCK_P)
    chosen = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1, cache_modifier=".cg").to(tl.int32)
    same = (chosen == expert) & (chosen >= 0)
    number = count + tl.cumsum(same.to(tl.int32), 0) - 1
    return pair, same, number


@triton.jit
def _advance(pair, same, count, last):
    """How many chose the expert after that step, and the last that did."""
    return count + tl.sum(same.to(tl.int32), 0), tl.maximum(last, tl.max(tl.where(same, pair, -1), 0))


@triton.jit
def pairs_of_group(
    ids_ptr, group, pairs, expert, start, BY_PAIR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(the pairs start .. start + BLOCK_T - 1 among those that chose `expert`, how many chose it in all).

    With BY_PAIR only the last pair that chose an expert stands for it, for another the number is 0, as it is for one
    that is left out. Entries past the number are pair 0.
    """
    found = tl.zeros([BLOCK_T], tl.int32)
    places = start + tl.arange(0, BLOCK_T)
    count = 0
    last = -1
    p = 0
    while p < pairs:
        pair, same, number = _scan(ids_ptr, p, pairs, expert, count, BLOCK_P)
        here = tl.where(same, number, -1)[None, :] == places[:, None]
        found += tl.sum(tl.where(here, pair[None, :], 0), 1)
        count, last = _advance(pair, same, count, last)
        p += BLOCK_P
    if BY_PAIR:
        count = tl.where(last == pairs - 1 - group, count, 0)
    return found, count


@triton.jit
def list_kernel(
    ids_ptr,
    x_ptr,
    expert_ptr,  # [groups]
    count_ptr,  # [groups]
    list_ptr,  # [groups, T]
    ready_ptr,  # [T, D] fp16 or e4m3, or with ORDERED [T, places of D], or None: x stays as it is
    scale_ptr,  # [T] fp32 of these
    pairs,
    tokens,
    groups,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    ORDERED: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """A group's pairs, in order, and after the groups a row of x, ordered, in fp16 or in e4m3. As `pairs_of_group`,
    with BY_PAIR a group may have none."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = tl.program_id(0)
    if group < groups:
        expert = expert_of_group(ids_ptr, group, pairs, E, BY_PAIR)
        count = 0
        last = -1
        p = 0
        while p < pairs:
            pair, same, number = _scan(ids_ptr, p, pairs, expert, count, BLOCK_P)
            tl.store(list_ptr + group * tokens + number, pair, mask=same)
            count, last = _advance(pair, same, count, last)
            p += BLOCK_P
        if BY_PAIR:
            count = tl.where(last == pairs - 1 - group, count, 0)
        tl.store(count_ptr + group, count)
        tl.store(expert_ptr + group, expert)
    elif ORDERED:
        store_ordered_row(x_ptr, ready_ptr, (group - groups).to(tl.int64), x_stride, D, BLOCK_D)
    elif scale_ptr is not None and ready_ptr.dtype.element_ty == tl.float8e4nv:
        store_narrow_row(x_ptr, ready_ptr, scale_ptr, (group - groups).to(tl.int64), x_stride, D, BLOCK_D)
    elif scale_ptr is not None:
        store_half_row(x_ptr, ready_ptr, scale_ptr, (group - groups).to(tl.int64), x_stride, D, BLOCK_D)


@triton.jit(do_not_specialize=["pairs"])
def rank_kernel(ids_ptr, counts_ptr, ranks_ptr, pairs, K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """Each pair's number among those of its expert. Every token is with the shared experts, so it is its own number."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shared = pair % K >= K - SHARED
    expert = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1)
    rank = tl.atomic_add(counts_ptr + expert, 1, mask=(expert >= 0) & ~shared, sem="relaxed")
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
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    expert = tl.arange(0, E2)
    counts = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    counts = tl.where((expert >= E - SHARED) & (expert < E), pairs // K, counts)
    starts = tl.cumsum(counts, 0) - counts

    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    expert_of_pair = tl.load(ids_ptr + pair, mask=inside, other=-1).to(tl.int32)
    inside = expert_of_pair >= 0
    expert_of_pair = tl.maximum(expert_of_pair, 0)
    rank = tl.load(ranks_ptr + pair, mask=inside, other=0)
    tl.store(sorted_ptr + tl.gather(starts, expert_of_pair, 0) + rank, pair, mask=inside)

    own = (counts + ROWS - 1) // ROWS  # an expert's blocks
    ends = tl.cumsum(own, 0)
    own = tl.maximum(own, 1)
    each = ((counts + UNIT - 1) // UNIT + own - 1) // own * UNIT
    block = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    past = ends[None, :] <= block[:, None]
    owner = tl.minimum(tl.sum(past.to(tl.int32), 1), E2 - 1)
    before = tl.max(tl.where(past, ends[None, :], 0), 1)
    most = tl.gather(each, owner, 0)
    done = (block - before) * most
    rows = tl.minimum(tl.maximum(tl.gather(counts, owner, 0) - done, 0), most)
    tl.store(blocks_ptr + 3 * block, owner, mask=block < blocks)
    tl.store(blocks_ptr + 3 * block + 1, tl.gather(starts, owner, 0) + done, mask=block < blocks)
    tl.store(blocks_ptr + 3 * block + 2, rows, mask=block < blocks)


class Scan(NamedTuple):
    """How programs search the ids: over how many groups, and so many ids at a time."""

    groups: int
    by_pair: bool  # there are fewer pairs than experts
    ids: int


def scan_of(P: int, experts: int, most: int) -> Scan:
    return Scan(min(P, experts), P < experts, min(most, max(16, triton.next_power_of_2(P))))


class Lists(NamedTuple):
    """Who works on what: group g of the launches is expert_G[g] for its first count_G[g] pairs of list_GT[g]."""

    expert_G: Tensor
    count_G: Tensor
    list_GT: Tensor


def empty_lists(groups: int, T: int, device: torch.device) -> Lists:
    """To be written, of T tokens."""
    expert_G, count_G = (torch.empty(groups, dtype=torch.int32, device=device) for _ in range(2))
    return Lists(expert_G, count_G, torch.empty(groups, T, dtype=torch.int32, device=device))


def list_pairs(
    x_TD: Tensor, ids_Tk: Tensor, experts: int, ordered: bool, narrow: bool = False
) -> tuple[Lists, Tensor, Tensor | None]:
    """(lists, x ready for products, and what to multiply its rows by) in one launch. x is ordered for words; or else in
    fp16 for fp8, or e4m3 if it is to be `narrow`; x itself and None if it is float32."""
    (T, D), device = x_TD.shape, x_TD.device
    scan = scan_of(ids_Tk.numel(), experts, 1024)
    lists = empty_lists(scan.groups, T, device)
    ready_TD, scale_T = x_TD, None
    if ordered:
        ready_TD = torch.empty(T, ordered_width(D), dtype=x_TD.dtype, device=device)
    elif x_TD.dtype != torch.float32:
        ready_TD = torch.empty(T, D, dtype=torch.float8_e4m3fn if narrow else torch.float16, device=device)
        scale_T = torch.empty(T, device=device)
    list_kernel[(scan.groups + (0 if ready_TD is x_TD else T),)](
        ids_Tk,
        x_TD,
        *lists,
        ready_TD,
        scale_T,
        ids_Tk.numel(),
        T,
        scan.groups,
        x_TD.stride(0),
        E=experts,
        D=D,
        ORDERED=ordered,
        BY_PAIR=scan.by_pair,
        BLOCK_P=scan.ids,
        BLOCK_D=max(128, triton.next_power_of_2(D)),
        num_warps=4,
        **pdl_options(x_TD),
    )
    return lists, ready_TD, scale_T


def rows_per_block(pairs: int, experts: int, few: int) -> int:
    """Rows of a tile, by whether an expert has `few` pairs on average: its last tile is partly empty, and a tile of
    fewer rows reads the weights more often."""
    return 64 if pairs <= few * experts else 128


def sort_pairs(ids_Tk: Tensor, experts: int, num_shared: int, rows: int, unit: int | None = None) -> Groups:
    """In two launches and a fill. The order within an expert, which atomic counters give, changes from run to run.

    With `unit`, which divides rows, an expert's blocks are about equally high, all but the last a multiple of it; or
    else all but the last have `rows`.
    """
    P, K, device = ids_Tk.numel(), ids_Tk.shape[1], ids_Tk.device
    counts_E = torch.zeros(experts, dtype=torch.int32, device=device)
    ranks_P, sorted_P = (torch.empty(P, dtype=torch.int32, device=device) for _ in range(2))
    blocks = most_blocks(P, experts, rows)
    blocks_N3 = torch.empty(blocks, 3, dtype=torch.int32, device=device)
    rank_kernel[(triton.cdiv(P, 256),)](ids_Tk, counts_E, ranks_P, P, K, num_shared, 256, num_warps=4)
    at_a_time = 64  # blocks of a program, whatever their number: another would be compiled when it is first met
    place_kernel[(max(triton.cdiv(P, 512), triton.cdiv(blocks, at_a_time)),)](
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
        UNIT=unit or rows,
        BLOCK=512,
        BLOCK_B=at_a_time,
        num_warps=4,
    )
    return Groups(sorted_P, blocks_N3, rows)
