"""mla_prefill as Triton kernels: latents gathered from the blocks, expanded by two batched products, and attention by
a running softmax (FlashAttention, arXiv:2205.14135), a program for BLOCK_M queries of a head.

Contexts are expanded MAX_CONTEXT tokens at a time: several sequences together, or a part of a longer one, whose sums
then wait in fp32 for the next part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.host_tables import Contexts, PerStep, contexts, pieces, table
from thalweg.ops.toolchain.triton_dot import dot

MAX_CONTEXT = 16384
GATHERED = 16  # tokens of a program that gathers
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["offsets_ptr", "block_tables_ptr"])
def gather_kernel(
    blocks_ptr,
    block_tables_ptr,
    latent_ptr,  # [S, C]
    pieces_ptr,
    offsets_ptr,
    spans_ptr,
    table_stride,
    block_size,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GATHERED: tl.constexpr,
):
    sequence = tl.load(pieces_ptr + 2 * tl.program_id(0))
    row = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1) + tl.arange(0, GATHERED)
    start = tl.load(offsets_ptr + sequence)
    inside = row < tl.load(offsets_ptr + sequence + 1)
    position = tl.load(spans_ptr + 3 * sequence) + row - start
    block = tl.load(block_tables_ptr + sequence * table_stride + position // block_size, mask=inside, other=0)
    source = block.to(tl.int64) * block_size + position % block_size
    c = tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (c < C)[None, :]
    values = tl.load(blocks_ptr + source[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(latent_ptr + row.to(tl.int64)[:, None] * C + c[None, :], values, mask=mask)


@triton.jit
def _attend(
    acc,
    most,
    total,
    q,
    q_rope,
    k_ptrs,
    rope_ptrs,
    v_ptrs,
    position,
    lo,
    begin,
    end,
    hi,
    scale,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The softmax sums of queries at `position` over the keys `begin` .. `end` - 1 of the part that begins at `lo`."""
    n = tl.arange(0, BLOCK_N)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        row = (first - lo).to(tl.int64)
        if MASK:
            here = first + n < hi
            k = tl.load(k_ptrs + row * K, mask=here[None, :], other=0.0)
            k_rope = tl.load(rope_ptrs + row * C, mask=here[None, :], other=0.0)
            v = tl.load(v_ptrs + row * V, mask=here[:, None], other=0.0)
        else:
            k = tl.load(k_ptrs + row * K)
            k_rope = tl.load(rope_ptrs + row * C)
            v = tl.load(v_ptrs + row * V)
        scores = (dot(q, k) + dot(q_rope, k_rope)) * scale
        if MASK:
            seen = (first + n)[None, :] <= tl.minimum(position, hi - 1)[:, None]
            scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        if MASK:
            safe = tl.where(new == -float("inf"), 0.0, new)  # a query all of whose keys lie in later parts
        else:
            safe = new
        p = tl.exp2(scores - safe[:, None])
        keep = tl.exp2(most - safe)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None] + dot(p.to(v.dtype), v)
        most = new
    return acc, most, total


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["offsets_ptr", "kv_offsets_ptr"])
def attend_kernel(
    q_ptr,  # [T, H, K + P]
    k_ptr,  # [H, S, K]
    latent_ptr,  # [S, R + P]
    v_ptr,  # [H, S, V]
    o_ptr,  # [T, H, V]
    acc_ptr,  # [T, H, V] fp32, with PART
    most_ptr,  # [T, H] fp32, with PART
    total_ptr,
    pieces_ptr,
    offsets_ptr,
    kv_offsets_ptr,
    spans_ptr,  # [B, 3] first position of the part, one past its last, position of the first query
    q_stride,
    S,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The last queries of a sequence have the most keys: they come first.
    piece = tl.num_programs(1) - 1 - tl.program_id(1)
    h = tl.program_id(0)
    sequence = tl.load(pieces_ptr + 2 * piece)
    t = tl.load(pieces_ptr + 2 * piece + 1) + tl.arange(0, BLOCK_M)
    start = tl.load(offsets_ptr + sequence)
    stop = tl.load(offsets_ptr + sequence + 1)
    base = tl.load(kv_offsets_ptr + sequence).to(tl.int64)
    lo = tl.load(spans_ptr + 3 * sequence)
    hi = tl.load(spans_ptr + 3 * sequence + 1)
    prefix = tl.load(spans_ptr + 3 * sequence + 2)
    inside = t < stop
    position = prefix + t - start
    k_dim = tl.arange(0, K)
    p_dim = tl.arange(0, P)
    v_dim = tl.arange(0, V)
    n = tl.arange(0, BLOCK_N)

    q_ptrs = q_ptr + t.to(tl.int64)[:, None] * q_stride + h * (K + P)
    q = tl.load(q_ptrs + k_dim[None, :], mask=inside[:, None], other=0.0)
    q_rope = tl.load(q_ptrs + K + p_dim[None, :], mask=inside[:, None], other=0.0)
    C: tl.constexpr = R + P
    row = h.to(tl.int64) * S + base + n
    k_ptrs = k_ptr + row[None, :] * K + k_dim[:, None]
    rope_ptrs = latent_ptr + (base + n)[None, :] * C + R + p_dim[:, None]
    v_ptrs = v_ptr + row[:, None] * V + v_dim[None, :]

    out = t.to(tl.int64) * H + h
    if PART:
        acc = tl.load(acc_ptr + out[:, None] * V + v_dim[None, :], mask=inside[:, None], other=0.0)
        most = tl.load(most_ptr + out, mask=inside, other=-float("inf"))
        total = tl.load(total_ptr + out, mask=inside, other=0.0)
    else:
        acc = tl.zeros([BLOCK_M, V], tl.float32)
        most = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    first_position = tl.min(position, 0)
    # Blocks that all queries see whole, then those at the diagonal and the end.
    whole = tl.maximum(tl.minimum(first_position + 1, hi) - lo, 0) // BLOCK_N * BLOCK_N + lo
    last = tl.minimum(first_position + BLOCK_M, hi)
    acc, most, total = _attend(
        acc,
        most,
        total,
        q,
        q_rope,
        k_ptrs,
        rope_ptrs,
        v_ptrs,
        position,
        lo,
        lo,
        whole,
        hi,
        scale,
        C,
        K,
        V,
        BLOCK_N,
        False,
        STAGES,
    )
    acc, most, total = _attend(
        acc,
        most,
        total,
        q,
        q_rope,
        k_ptrs,
        rope_ptrs,
        v_ptrs,
        position,
        lo,
        whole,
        last,
        hi,
        scale,
        C,
        K,
        V,
        BLOCK_N,
        True,
        STAGES,
    )
    if PART:
        tl.store(acc_ptr + out[:, None] * V + v_dim[None, :], acc, mask=inside[:, None])
        tl.store(most_ptr + out, most, mask=inside)
        tl.store(total_ptr + out, total, mask=inside)
    else:
        o = acc / total[:, None]
        tl.store(o_ptr + out[:, None] * V + v_dim[None, :], o.to(o_ptr.dtype.element_ty), mask=inside[:, None])


def mla_prefill(
    q_THX: Tensor,
    blocks_MSC: Tensor,
    *,
    block_tables_BN: Tensor,
    context_lens: Sequence[int],
    offsets: Sequence[int],
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    scale: float,
) -> Tensor:
    (T, H, X), V = q_THX.shape, w_uv_HVR.shape[1]
    q_THX = q_THX if q_THX.stride()[1:] == (X, 1) else q_THX.contiguous()
    o_THV = torch.empty(T, H, V, dtype=q_THX.dtype, device=q_THX.device)
    w_uk_HRK, w_uv_HRV = w_uk_HKR.transpose(1, 2), w_uv_HVR.transpose(1, 2)
    for b, end, total in _groups(context_lens, offsets):
        queries = slice(offsets[b], offsets[end])
        local = offsets if (b, end) == (0, len(context_lens)) else [n - offsets[b] for n in offsets[b : end + 1]]
        whole = total <= MAX_CONTEXT
        L = queries.stop - queries.start
        sums: tuple[Tensor, ...] = ()
        if not whole:
            acc_LHV = torch.zeros(L, H, V, dtype=torch.float32, device=q_THX.device)
            sums = (acc_LHV, acc_LHV.new_full((L, H), -torch.inf), acc_LHV.new_zeros(L, H))
        for lo in [0] if whole else range(0, total, MAX_CONTEXT):
            if whole:
                part = contexts(context_lens[b:end], local, GATHERED, q_THX.device)
            else:
                part = _part(lo, min(total, lo + MAX_CONTEXT), context_lens[b], q_THX.device)
            latent_SC = _gather(blocks_MSC, block_tables_BN[b:end], part)
            latent_SR = latent_SC[:, : w_uk_HRK.shape[1]]
            keys, values = torch.matmul(latent_SR, w_uk_HRK), torch.matmul(latent_SR, w_uv_HRV)
            _launch(q_THX[queries], keys, latent_SC, values, o_THV[queries], sums, local, part, scale)
        if sums:
            torch.div(sums[0], sums[2].unsqueeze(-1), out=o_THV[queries])
    return o_THV


def _groups(context_lens: Sequence[int], offsets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Ranges of sequences that have at most MAX_CONTEXT tokens together, or a single one that has more, and how many
    they have. A captured step, which is for so many in all, has one range."""
    if isinstance(offsets, PerStep):
        yield 0, len(context_lens), offsets.tables.limits.context
        return
    begin, tokens = 0, 0
    for b, (cached, before, after) in enumerate(zip(context_lens, offsets, offsets[1:], strict=False)):
        n = cached + after - before if after > before else 0
        if tokens and tokens + n > MAX_CONTEXT:
            yield begin, b, tokens
            tokens = 0
        begin = begin if tokens else b
        tokens += n
    if tokens:
        yield begin, len(context_lens), tokens


def _part(lo: int, hi: int, cached: int, device: torch.device) -> Contexts:
    """The tokens lo .. hi - 1 of one sequence."""
    return Contexts(hi - lo, pieces((0, hi - lo), GATHERED, device), table((lo, hi, cached), device).view(1, 3))


def _gather(blocks_MSC: Tensor, block_tables_BN: Tensor, part: Contexts) -> Tensor:
    _, block_size, C = blocks_MSC.shape
    latent_SC = torch.empty(part.total, C, dtype=blocks_MSC.dtype, device=blocks_MSC.device)
    gather_kernel[(part.cut.num,)](
        blocks_MSC,
        block_tables_BN,
        latent_SC,
        part.cut.pieces_N2,
        part.cut.offsets_B1,
        part.totals_B3,
        block_tables_BN.stride(0),
        block_size,
        C,
        triton.next_power_of_2(C),
        GATHERED,
        num_warps=8,
    )
    return latent_SC


def _launch(
    q_LHX: Tensor,
    k_HSK: Tensor,
    latent_SC: Tensor,
    v_HSV: Tensor,
    o_LHV: Tensor,
    sums: tuple[Tensor, ...],
    offsets: Sequence[int],
    part: Contexts,
    scale: float,
    block_m: int = 128,
    block_n: int = 64,
    stages: int = 3,
    warps: int = 8,
) -> None:
    (H, S, K), V, X, device = k_HSK.shape, v_HSV.shape[2], q_LHX.shape[2], q_LHX.device
    cut = pieces(offsets, block_m, device)
    acc, most, total = sums or (o_LHV, o_LHV, o_LHV)
    attend_kernel[(H, cut.num)](
        q_LHX,
        k_HSK,
        latent_SC,
        v_HSV,
        o_LHV,
        acc,
        most,
        total,
        cut.pieces_N2,
        cut.offsets_B1,
        part.cut.offsets_B1,
        part.totals_B3,
        q_LHX.stride(0),
        S,
        scale * LOG2_E,
        H,
        K,
        V,
        latent_SC.shape[1] - (X - K),
        X - K,
        bool(sums),
        block_m,
        block_n,
        stages,
        num_warps=warps,
    )
