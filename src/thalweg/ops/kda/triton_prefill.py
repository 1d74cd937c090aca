"""kda_prefill in three Triton launches, CHUNK tokens of a head at a time.

With a_i = exp(g_i), S0 the state before a chunk and everything else as in reference.chunk_kda:

    (I + A) U = beta (V - (K decayed from the start) S0),    A_ij = beta_i k_i . (k_j a_{j+1} .. a_i), j < i
    O = (Q decayed from the start) S0 + P U,                 P_ij = q_i . (k_j a_{j+1} .. a_i), j <= i
    S = a_1 .. a_C S0 + (K decayed to the end)^T U

1. Running sums G of g in each chunk.
2. All that does not need S0, for every chunk and head at once: P, T = (I + A)^-1, W = T beta K and T beta V.
3. The chunks of a sequence in order, for a head and some rows of its state: U = T beta V - W S0, O, and the next S0.

Decays between two tokens never come from quotients of decays. For halves of b = 1, 2, 4 .. tokens next to each other,
row = last token of the first half: for i in the second and j in the first, a_{j+1} .. a_i is exp(G_i - G_row) times
exp(G_row - G_j), and both are at most 1. So each b takes one exponential an entry and one product for A and P, and at
the same time T, known for blocks of b, becomes known for blocks of 2 b: T - T A_b T. All entries of T are at most 1,
since every token's step shrinks what it acts on; so are the decayed keys and queries. They go into the products as
float16, which is finer than bfloat16 there; what can be large is bfloat16. Sums are in fp32.

With fp32 inputs all products are in fp32, and G is in float64, for differences of large sums are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.host_tables import pieces
from thalweg.ops.triton_dot import INTERPRETED

CHUNK = 64


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, acc, DTYPE: tl.constexpr):
    """acc + a @ b of operands rounded to DTYPE. The interpreter's bf16 product is wrong, so it gets fp32 ones."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def running_sums_kernel(g_ptr, G_ptr, pieces_ptr, offsets_ptr, g_stride, HK, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """G [chunks, CHUNK, H * K]; past the end of a sequence it stays as it is."""
    chunk = tl.program_id(0)
    sequence = tl.load(pieces_ptr + 2 * chunk)
    first = tl.load(pieces_ptr + 2 * chunk + 1)
    count = tl.load(offsets_ptr + sequence + 1) - first
    i = tl.arange(0, CHUNK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < count)[:, None] & (c < HK)[None, :]
    g = tl.load(g_ptr + (first + i).to(tl.int64)[:, None] * g_stride + c[None, :], mask=inside, other=0.0)
    G_ptrs = G_ptr + (chunk.to(tl.int64) * CHUNK + i)[:, None] * HK + c[None, :]
    tl.store(G_ptrs, tl.cumsum(g.to(G_ptr.dtype.element_ty), 0), mask=(c < HK)[None, :])


@triton.jit
def within_chunks_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    G_ptr,  # [N, C, H, K]
    q_decayed_ptr,  # [N, H, C, K]
    k_decayed_ptr,  # [N, H, C, K]
    w_ptr,  # [N, H, C, K]
    u_ptr,  # [N, H, C, V]
    p_ptr,  # [N, H, C, C]
    pieces_ptr,
    offsets_ptr,
    q_stride,
    k_stride,
    v_stride,
    beta_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,  # dtype of what is at most 1
    WIDE: tl.constexpr,  # and of what is not
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    sequence = tl.load(pieces_ptr + 2 * chunk)
    first = tl.load(pieces_ptr + 2 * chunk + 1).to(tl.int64)
    count = tl.load(offsets_ptr + sequence + 1) - first
    i = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK)
    rows = first + i
    here = (i < count)[:, None]
    q_ptrs = q_ptr + rows[:, None] * q_stride + h * K + n[None, :]
    k_ptrs = k_ptr + rows[:, None] * k_stride + h * K + n[None, :]
    G_ptrs = G_ptr + (chunk.to(tl.int64) * CHUNK * H + h) * K + n[None, :]
    at_i = i[:, None] * (H * K)
    beta = tl.load(beta_ptr + rows * beta_stride + h, mask=i < count, other=0.0).to(tl.float32)
    q_sq = tl.zeros([CHUNK], tl.float32)
    k_sq = tl.zeros([CHUNK], tl.float32)
    q_k = tl.zeros([CHUNK], tl.float32)
    for c in tl.range(0, K, BLOCK, num_stages=1):
        inside = here & (c + n < K)[None, :]
        q = tl.load(q_ptrs + c, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_ptrs + c, mask=inside, other=0.0).to(tl.float32)
        q_sq += tl.sum(q * q, 1)
        k_sq += tl.sum(k * k, 1)
        q_k += tl.sum(q * k, 1)
    r_q = tl.rsqrt(q_sq + 1e-6)
    r_k = tl.rsqrt(k_sq + 1e-6)
    scale: tl.constexpr = K**-0.5

    out = chunk.to(tl.int64) * H + h
    P_ptrs = p_ptr + out * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    difference = i[:, None] ^ i[None, :]
    P = tl.where(difference == 0, (q_k * r_q * r_k * scale)[:, None], 0.0)
    tl.store(P_ptrs, P.to(p_ptr.dtype.element_ty), mask=i[:, None] <= i[None, :])
    T = tl.where(difference == 0, 1.0, 0.0)
    half = 1
    while half < CHUNK:
        middle = (i | (2 * half - 1)) - half  # the last token of the first half
        A = tl.zeros([CHUNK, CHUNK], tl.float32)
        P = tl.zeros([CHUNK, CHUNK], tl.float32)
        for c in tl.range(0, K, BLOCK, num_stages=1):
            c_mask = (c + n < K)[None, :]
            G = tl.load(G_ptrs + at_i + c, mask=c_mask, other=0.0)
            G_middle = tl.load(G_ptrs + middle[:, None] * (H * K) + c, mask=c_mask, other=0.0)
            X = tl.exp(-tl.abs((G - G_middle).to(tl.float32)))
            k = tl.load(k_ptrs + c, mask=here & c_mask, other=0.0).to(tl.float32)
            q = tl.load(q_ptrs + c, mask=here & c_mask, other=0.0).to(tl.float32)
            kX = (k * r_k[:, None] * X).to(UNIT)
            A = _dot(kX, tl.trans(kX), A, UNIT)
            P = _dot(q * r_q[:, None] * X, tl.trans(kX), P, UNIT)
        # i and j lie in neighbouring halves where their highest differing bit is that of `half`.
        pair = (i[:, None] > i[None, :]) & (difference >= half) & (difference < 2 * half)
        tl.store(P_ptrs, (P * scale).to(p_ptr.dtype.element_ty), mask=pair)
        A = tl.where(pair, A * beta[:, None], 0.0)
        zero = tl.zeros([CHUNK, CHUNK], tl.float32)
        T -= _dot(_dot(T, A, zero, UNIT), T, zero, UNIT)
        half *= 2

    T *= beta[None, :]
    for c in tl.range(0, K, BLOCK, num_stages=1):
        c_mask = (c + n < K)[None, :]
        G = tl.load(G_ptrs + at_i + c, mask=c_mask, other=0.0)
        G_end = tl.load(G_ptrs + (CHUNK - 1) * (H * K) + c, mask=c_mask, other=0.0)
        k = tl.load(k_ptrs + c, mask=here & c_mask, other=0.0).to(tl.float32) * r_k[:, None]
        q = tl.load(q_ptrs + c, mask=here & c_mask, other=0.0).to(tl.float32) * (r_q * scale)[:, None]
        at = out * CHUNK * K + i[:, None] * K + c + n[None, :]
        from_start = tl.exp(G.to(tl.float32))
        tl.store(q_decayed_ptr + at, (q * from_start).to(q_decayed_ptr.dtype.element_ty), mask=c_mask)
        to_end = tl.exp((G_end - G).to(tl.float32))
        tl.store(k_decayed_ptr + at, (k * to_end).to(k_decayed_ptr.dtype.element_ty), mask=c_mask)
        w = _dot(T, k * from_start, tl.zeros([CHUNK, BLOCK], tl.float32), UNIT)
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=c_mask)
    for c in tl.range(0, V, BLOCK, num_stages=1):
        c_mask = (c + n < V)[None, :]
        v = tl.load(v_ptr + rows[:, None] * v_stride + h * V + c + n[None, :], mask=here & c_mask, other=0.0)
        u = _dot(T, v, tl.zeros([CHUNK, BLOCK], tl.float32), WIDE)
        u_ptrs = u_ptr + out * CHUNK * V + i[:, None] * V + c + n[None, :]
        tl.store(u_ptrs, u.to(u_ptr.dtype.element_ty), mask=c_mask)


@triton.jit
def across_chunks_kernel(
    q_decayed_ptr,
    k_decayed_ptr,
    w_ptr,
    u_ptr,
    p_ptr,
    G_ptr,
    state_ptr,
    slots_ptr,
    o_ptr,  # [T, H, V]
    offsets_ptr,
    firsts_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    sequence = tl.program_id(2)
    h = tl.program_id(1)
    first = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    if first == end:
        return
    chunk = tl.load(firsts_ptr + sequence).to(tl.int64)
    i = tl.arange(0, CHUNK)
    k = tl.arange(0, BLOCK_K)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(slots_ptr + sequence)
    S_ptrs = state_ptr + ((slot * H + h) * V + v[:, None]) * K + k[None, :]
    S_mask = (v < V)[:, None] & (k < K)[None, :]
    S = tl.load(S_ptrs, mask=S_mask, other=0.0).to(tl.float32)

    at_k = i[:, None] * K + k[None, :]
    k_mask = (k < K)[None, :]
    v_mask = (v < V)[None, :]
    for n in tl.range(0, tl.cdiv(end - first, CHUNK), num_stages=STAGES):
        at = (chunk + n) * H + h
        w = tl.load(w_ptr + at * CHUNK * K + at_k, mask=k_mask, other=0.0)
        u = tl.load(u_ptr + at * CHUNK * V + i[:, None] * V + v[None, :], mask=v_mask, other=0.0)
        q_decayed = tl.load(q_decayed_ptr + at * CHUNK * K + at_k, mask=k_mask, other=0.0)
        k_decayed = tl.load(k_decayed_ptr + at * CHUNK * K + at_k, mask=k_mask, other=0.0)
        P = tl.load(p_ptr + at * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
        G_end = tl.load(G_ptr + (((chunk + n) * CHUNK + CHUNK - 1) * H + h) * K + k, mask=k < K, other=0.0)

        S_wide = S.to(WIDE)
        zero = tl.zeros([BLOCK_V, CHUNK], tl.float32)
        U = tl.trans(u).to(tl.float32) - _dot(S_wide, tl.trans(w), zero, WIDE)
        o = _dot(S_wide, tl.trans(q_decayed), zero, WIDE)
        o = _dot(U, tl.trans(P), o, WIDE)
        S = _dot(U, k_decayed, S * tl.exp(G_end.to(tl.float32))[None, :], WIDE)
        t = first + n * CHUNK + i
        o_ptrs = o_ptr + (t.to(tl.int64) * H + h)[:, None] * V + v[None, :]
        tl.store(o_ptrs, tl.trans(o).to(o_ptr.dtype.element_ty), mask=(t < end)[:, None] & v_mask)
    tl.store(S_ptrs, S.to(state_ptr.dtype.element_ty), mask=S_mask)


def kda_prefill(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_THK: Tensor,
    beta_TH: Tensor,
    state_NHVK: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
) -> Tensor:
    (T, H, K), V, device = q_THK.shape, v_THV.shape[-1], q_THK.device
    o_THV = torch.empty(T, H, V, dtype=v_THV.dtype, device=device)
    if not T:
        return o_THV
    q, k, v, g = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_THK, k_THK, v_THV, g_THK))
    beta = beta_TH if beta_TH.stride(1) == 1 else beta_TH.contiguous()
    exact = v.dtype == torch.float32
    unit, wide = (tl.float32, tl.float32) if exact else (tl.float16, tl.bfloat16)
    cut = pieces(offsets, CHUNK, device)
    N = cut.num

    G = torch.empty(N, CHUNK, H, K, dtype=torch.float64 if exact else torch.float32, device=device)
    running_sums_kernel[(N, triton.cdiv(H * K, 64))](
        g, G, cut.pieces_N2, cut.offsets_B1, g.stride(0), H * K, CHUNK, 64, num_warps=4
    )
    q_decayed, k_decayed, w = (torch.empty(N, H, CHUNK, K, dtype=v.dtype, device=device) for _ in range(3))
    u = torch.empty(N, H, CHUNK, V, dtype=v.dtype, device=device)
    p = torch.empty(N, H, CHUNK, CHUNK, dtype=v.dtype, device=device)
    within_chunks_kernel[(N, H)](
        q,
        k,
        v,
        beta,
        G,
        q_decayed,
        k_decayed,
        w,
        u,
        p,
        cut.pieces_N2,
        cut.offsets_B1,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        beta.stride(0),
        H,
        K,
        V,
        32,
        CHUNK,
        unit,
        wide,
        num_warps=8 if exact else 4,
    )
    B = len(offsets) - 1
    block_k, rows = max(16, triton.next_power_of_2(K)), 32
    across_chunks_kernel[(triton.cdiv(V, rows), H, B)](
        q_decayed,
        k_decayed,
        w,
        u,
        p,
        G,
        state_NHVK,
        slots_B,
        o_THV,
        cut.offsets_B1,
        cut.firsts_B1,
        H,
        K,
        V,
        block_k,
        rows,
        CHUNK,
        wide,
        STAGES=1 if exact else 2,
        num_warps=4,
    )
    return o_THV
