"""Attention of mla_prefill: a running softmax (FlashAttention, arXiv:2205.14135), a program for BLOCK_M queries of a
head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.attention.mla.expanded import prefill_by
from thalweg.ops.host_tables import Contexts, pieces
from thalweg.ops.toolchain.triton_dot import dot

LOG2_E = 1.4426950408889634


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
    KV_STRIDE: tl.constexpr,
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
            k = tl.load(k_ptrs + row * KV_STRIDE, mask=here[None, :], other=0.0)
            k_rope = tl.load(rope_ptrs + row * C, mask=here[None, :], other=0.0)
            v = tl.load(v_ptrs + row * KV_STRIDE, mask=here[:, None], other=0.0)
        else:
            k = tl.load(k_ptrs + row * KV_STRIDE)
            k_rope = tl.load(rope_ptrs + row * C)
            v = tl.load(v_ptrs + row * KV_STRIDE)
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


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "kv_offsets_ptr"])
def attend_kernel(
    q_ptr,  # [T, H, K + P]
    kv_ptr,  # [S, H, K + V]
    latent_ptr,  # [S, R + P]
    o_ptr,  # [T, H, V]
    acc_ptr,  # [T, H, V] fp32, with PART
    most_ptr,  # [T, H] fp32, with PART
    total_ptr,
    pieces_ptr,
    offsets_ptr,
    kv_offsets_ptr,
    spans_ptr,  # [B, 3] first position of the part, one past its last, position of the first query
    q_stride,
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
    kv_ptrs = kv_ptr + ((base + n) * H + h) * (K + V)
    k_ptrs = kv_ptrs[None, :] + k_dim[:, None]
    rope_ptrs = latent_ptr + (base + n)[None, :] * C + R + p_dim[:, None]
    v_ptrs = kv_ptrs[:, None] + K + v_dim[None, :]

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
        H * (K + V),
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
        H * (K + V),
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


def attend(
    q_LHX: Tensor,
    kv_SHX: Tensor,
    latent_SC: Tensor,
    o_LHV: Tensor,
    sums: tuple[Tensor, ...],
    offsets: Sequence[int],
    starts: Sequence[int],
    part: Contexts,
    scale: float,
    block_m: int = 128,
    block_n: int = 64,
    stages: int = 3,
    warps: int = 8,
) -> None:
    (H, X), V, device = q_LHX.shape[1:], o_LHV.shape[2], q_LHX.device
    K = kv_SHX.shape[2] - V
    cut = pieces(offsets, block_m, device)
    acc, most, total = sums or (o_LHV, o_LHV, o_LHV)
    attend_kernel[(H, cut.num)](
        q_LHX,
        kv_SHX,
        latent_SC,
        o_LHV,
        acc,
        most,
        total,
        cut.pieces_N2,
        cut.offsets_B1,
        part.cut.offsets_B1,
        part.totals_B3,
        q_LHX.stride(0),
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


mla_prefill = partial(prefill_by, attend)
