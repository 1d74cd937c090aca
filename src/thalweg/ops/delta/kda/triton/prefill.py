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

from thalweg.ops.host_tables import Boundaries, pieces
from thalweg.ops.toolchain.triton_dot import INTERPRETED

CHUNK = 64


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, acc, DTYPE: tl.constexpr):
    """acc + a @ b of operands rounded to DTYPE. The interpreter's bf16 product is wrong, so it gets fp32 ones."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")  # of fp32: three products that add up to all its bits


@triton.jit
def _once(x):
    """x, said to have a side effect, so that it is computed once: the compiler would do it again for every layout that
    a product wants it in, loads and exponentials included, and run out of registers."""
    if INTERPRETED or x.dtype == tl.float32:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr"])
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
def _load(x_ptr, rows, stride, columns, here, WIDTH: tl.constexpr):
    mask = here[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _within_half(
    q_ptr,
    k_ptr,
    q_stride,
    k_stride,
    G_ptr,
    G_stride,
    p_ptr,
    q_scale,
    k_scale,
    q_k,
    beta,
    i,
    here,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """(I + A)^-1 of the rows i, a half of the chunk; their P goes to memory, zeros above its diagonal included."""
    ROWS: tl.constexpr = CHUNK // 2
    n = tl.arange(0, BLOCK)
    j = tl.arange(0, ROWS)
    # Two rows lie in neighbouring halves of `half` tokens where that is the highest bit in which they differ.
    difference = tl.where(j[:, None] > j[None, :], j[:, None] ^ j[None, :], 0)
    A = tl.zeros([ROWS, ROWS], tl.float32)
    P = tl.where(j[:, None] == j[None, :], q_k[:, None], 0.0)
    zero = tl.zeros([ROWS, ROWS], tl.float32)
    for c in tl.range(0, K, BLOCK, num_stages=1):
        G = _load(G_ptr, i, G_stride, c + n, i < CHUNK, K)
        k = (_load(k_ptr, i, k_stride, c + n, here, K).to(tl.float32) * k_scale[:, None]).to(UNIT)
        q = (_load(q_ptr, i, q_stride, c + n, here, K).to(tl.float32) * q_scale[:, None]).to(UNIT)
        half = 1
        while half < ROWS:
            middle = (i | (2 * half - 1)) - half  # the last token of the first half
            X = tl.exp(-tl.abs((G - _load(G_ptr, middle, G_stride, c + n, i < CHUNK, K)).to(tl.float32)))
            pair = (difference >= half) & (difference < 2 * half)
            kX = _once((k * X).to(UNIT))
            A += tl.where(pair, _dot(kX, tl.trans(kX), zero, UNIT), 0.0)
            P += tl.where(pair, _dot(_once((q * X).to(UNIT)), tl.trans(kX), zero, UNIT), 0.0)
            half *= 2
    A *= beta[:, None]
    T = tl.where(j[:, None] == j[None, :], 1.0, 0.0)
    half = 1
    while half < ROWS:
        pair = (difference >= half) & (difference < 2 * half)
        T -= _dot(_dot(T, tl.where(pair, A, 0.0), zero, UNIT), T, zero, UNIT)
        half *= 2
    tl.store(p_ptr + i[:, None] * CHUNK + i[None, :], (P * K**-0.5).to(p_ptr.dtype.element_ty))
    return T


@triton.jit
def _scales(q_ptr, k_ptr, i, q_stride, k_stride, here, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """What makes queries and keys of length 1, and their products then."""
    q = _load(q_ptr, i, q_stride, tl.arange(0, BLOCK_K), here, K).to(tl.float32)
    k = _load(k_ptr, i, k_stride, tl.arange(0, BLOCK_K), here, K).to(tl.float32)
    q_scale = tl.rsqrt(tl.sum(q * q, 1) + 1e-6)
    k_scale = tl.rsqrt(tl.sum(k * k, 1) + 1e-6)
    return q_scale, k_scale, tl.sum(q * k, 1) * q_scale * k_scale


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr"])
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
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,  # dtype of what is at most 1
    WIDE: tl.constexpr,  # and of what is not
):
    """In two halves, a and b: tiles of 32 rows stay clear of asynchronous products, which Triton 3.6 got wrong here."""
    ROWS: tl.constexpr = CHUNK // 2
    stride: tl.constexpr = H * K
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    sequence = tl.load(pieces_ptr + 2 * chunk)
    first = tl.load(pieces_ptr + 2 * chunk + 1).to(tl.int64)
    count = tl.load(offsets_ptr + sequence + 1) - first
    a = tl.arange(0, ROWS)
    b = a + ROWS
    n = tl.arange(0, BLOCK)
    here_a = a < count
    here_b = b < count
    q_ptr += first * q_stride + h * K
    k_ptr += first * k_stride + h * K
    v_ptr += first * v_stride + h * V
    beta_ptr += first * beta_stride + h
    G_ptr += (chunk.to(tl.int64) * CHUNK * H + h) * K
    out = chunk.to(tl.int64) * H + h
    p_ptr += out * CHUNK * CHUNK
    beta_a = tl.load(beta_ptr + a * beta_stride, mask=here_a, other=0.0).to(tl.float32)
    beta_b = tl.load(beta_ptr + b * beta_stride, mask=here_b, other=0.0).to(tl.float32)

    q_a, k_a, qk_a = _scales(q_ptr, k_ptr, a, q_stride, k_stride, here_a, K, BLOCK_K)
    T_aa = _within_half(
        q_ptr, k_ptr, q_stride, k_stride, G_ptr, stride, p_ptr, q_a, k_a, qk_a, beta_a, a, here_a, CHUNK, K, BLOCK, UNIT
    )
    q_b, k_b, qk_b = _scales(q_ptr, k_ptr, b, q_stride, k_stride, here_b, K, BLOCK_K)
    T_bb = _within_half(
        q_ptr, k_ptr, q_stride, k_stride, G_ptr, stride, p_ptr, q_b, k_b, qk_b, beta_b, b, here_b, CHUNK, K, BLOCK, UNIT
    )
    zero = tl.zeros([ROWS, ROWS], tl.float32)
    A_ba = zero
    P_ba = zero
    for c in tl.range(0, K, BLOCK, num_stages=1):
        G_middle = tl.load(G_ptr + (ROWS - 1) * stride + c + n, mask=c + n < K, other=0.0)[None, :]
        X = tl.exp((G_middle - _load(G_ptr, a, stride, c + n, a < CHUNK, K)).to(tl.float32))
        kX = tl.trans(_once((_load(k_ptr, a, k_stride, c + n, here_a, K).to(tl.float32) * k_a[:, None] * X).to(UNIT)))
        X = tl.exp((_load(G_ptr, b, stride, c + n, b < CHUNK, K) - G_middle).to(tl.float32))
        A_ba = _dot(
            _once((_load(k_ptr, b, k_stride, c + n, here_b, K).to(tl.float32) * k_b[:, None] * X).to(UNIT)),
            kX,
            A_ba,
            UNIT,
        )
        P_ba = _dot(
            _once((_load(q_ptr, b, q_stride, c + n, here_b, K).to(tl.float32) * q_b[:, None] * X).to(UNIT)),
            kX,
            P_ba,
            UNIT,
        )
    tl.store(p_ptr + b[:, None] * CHUNK + a[None, :], (P_ba * K**-0.5).to(p_ptr.dtype.element_ty))
    tl.store(p_ptr + a[:, None] * CHUNK + b[None, :], zero.to(p_ptr.dtype.element_ty))
    T_ba = -_dot(_dot(T_bb, A_ba * beta_b[:, None], zero, UNIT), T_aa, zero, UNIT) * beta_a[None, :]
    T_aa *= beta_a[None, :]
    T_bb *= beta_b[None, :]

    zero = tl.zeros([ROWS, BLOCK], tl.float32)
    for c in tl.range(0, K, BLOCK, num_stages=1):
        mask = (c + n < K)[None, :]
        G_end = tl.load(G_ptr + (CHUNK - 1) * stride + c + n, mask=c + n < K, other=0.0)[None, :]
        at_a = out * CHUNK * K + a[:, None] * K + c + n[None, :]
        at_b = at_a + ROWS * K
        G = _load(G_ptr, a, stride, c + n, a < CHUNK, K)
        q = _load(q_ptr, a, q_stride, c + n, here_a, K).to(tl.float32) * (q_a * K**-0.5)[:, None]
        k = _load(k_ptr, a, k_stride, c + n, here_a, K).to(tl.float32) * k_a[:, None]
        to_end = tl.exp((G_end - G).to(tl.float32))
        tl.store(k_decayed_ptr + at_a, (k * to_end).to(k_decayed_ptr.dtype.element_ty), mask=mask)
        from_start = tl.exp(G.to(tl.float32))
        tl.store(q_decayed_ptr + at_a, (q * from_start).to(q_decayed_ptr.dtype.element_ty), mask=mask)
        kX = _once((k * from_start).to(UNIT))
        tl.store(w_ptr + at_a, _dot(T_aa, kX, zero, UNIT).to(w_ptr.dtype.element_ty), mask=mask)
        w_b = _dot(T_ba, kX, zero, UNIT)
        G = _load(G_ptr, b, stride, c + n, b < CHUNK, K)
        q = _load(q_ptr, b, q_stride, c + n, here_b, K).to(tl.float32) * (q_b * K**-0.5)[:, None]
        k = _load(k_ptr, b, k_stride, c + n, here_b, K).to(tl.float32) * k_b[:, None]
        to_end = tl.exp((G_end - G).to(tl.float32))
        tl.store(k_decayed_ptr + at_b, (k * to_end).to(k_decayed_ptr.dtype.element_ty), mask=mask)
        from_start = tl.exp(G.to(tl.float32))
        tl.store(q_decayed_ptr + at_b, (q * from_start).to(q_decayed_ptr.dtype.element_ty), mask=mask)
        tl.store(
            w_ptr + at_b, _dot(T_bb, _once((k * from_start).to(UNIT)), w_b, UNIT).to(w_ptr.dtype.element_ty), mask=mask
        )
    for c in tl.range(0, V, BLOCK, num_stages=1):
        mask = (c + n < V)[None, :]
        at_a = out * CHUNK * V + a[:, None] * V + c + n[None, :]
        v = _load(v_ptr, a, v_stride, c + n, here_a, V)
        tl.store(u_ptr + at_a, _dot(T_aa, v, zero, WIDE).to(u_ptr.dtype.element_ty), mask=mask)
        u_b = _dot(T_ba, v, zero, WIDE)
        v = _load(v_ptr, b, v_stride, c + n, here_b, V)
        tl.store(u_ptr + at_a + ROWS * V, _dot(T_bb, v, u_b, WIDE).to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "firsts_ptr", "saves_ptr", "slots_ptr"])
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
    saves_ptr,
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
        save = tl.load(saves_ptr + chunk + n).to(tl.int64)
        if save > 0:  # not by a mask: the state is laid out for products, and a store wants it otherwise
            save_ptrs = state_ptr + ((save * H + h) * V + v[:, None]) * K + k[None, :]
            tl.store(save_ptrs, S.to(state_ptr.dtype.element_ty), mask=S_mask)
    tl.store(S_ptrs, S.to(state_ptr.dtype.element_ty), mask=S_mask)


def kda_prefill(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_THK: Tensor,
    beta_TH: Tensor,
    *,
    state_NHVK: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    boundaries: Boundaries = (),
) -> Tensor:
    (T, H, K), V, device = q_THK.shape, v_THV.shape[-1], q_THK.device
    o_THV = torch.empty(T, H, V, dtype=v_THV.dtype, device=device)
    if not T:
        return o_THV
    q, k, v, g = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_THK, k_THK, v_THV, g_THK))
    beta = beta_TH if beta_TH.stride(1) == 1 else beta_TH.contiguous()
    exact = v.dtype == torch.float32
    unit, wide = (tl.float32, tl.float32) if exact else (tl.float16, tl.bfloat16)
    cut = pieces(offsets, CHUNK, device, boundaries)
    N = cut.num

    G = torch.empty(N, CHUNK, H, K, dtype=torch.float64 if exact else torch.float32, device=device)
    running_sums_kernel[(N, triton.cdiv(H * K, 64))](
        g, G, cut.pieces_N2, cut.offsets_B1, g.stride(0), H * K, CHUNK, 64, num_warps=4
    )
    q_decayed, k_decayed, w = (torch.empty(N, H, CHUNK, K, dtype=v.dtype, device=device) for _ in range(3))
    u = torch.empty(N, H, CHUNK, V, dtype=v.dtype, device=device)
    p = torch.empty(N, H, CHUNK, CHUNK, dtype=v.dtype, device=device)
    block_k = max(16, triton.next_power_of_2(K))
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
        block_k,
        CHUNK,
        unit,
        wide,
        num_warps=4,
    )
    B = len(offsets) - 1
    rows = 32
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
        cut.saves_N,
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
