"""The decode mixer of a KDA layer as one Triton kernel: a program per head and group of sequences.

A program takes the up-projections of its head for all its sequences at once through the matrix units, then goes
through the sequences, with the next one's state on its way while it works on one. It owns its head's channels of the
convolution states and its head's recurrent states, so nothing is exchanged between programs.

Written out, with r_q = K^-0.5 / |q|, r_k = 1 / |k| and D the decayed state: u = beta (v - r_k D k) and
o = r_q (D q + u (q . k) r_k). So one pass over D gives both products, and the new state D + u (r_k k)^T is written
without being read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.toolchain.triton_dot import dot
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.ops.toolchain.triton_support import multiprocessors

MAX_ROWS = 16  # sequences of a program: rows of a matrix unit's smallest tile


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _inputs(x_ptr, s_ptr, S_ptr, S_tile, c, c_mask, beta_ptr, here, C: tl.constexpr):
    """One sequence's recurrent state, its convolution window (oldest input first) and its raw beta."""
    S = tl.load(S_ptr + S_tile, mask=here, cache_modifier=".cg")
    mask = c_mask & here
    x0 = tl.load(s_ptr + c, mask=mask, other=0.0)
    x1 = tl.load(s_ptr + C + c, mask=mask, other=0.0)
    x2 = tl.load(s_ptr + 2 * C + c, mask=mask, other=0.0)
    x3 = tl.load(x_ptr + c, mask=mask, other=0.0)
    return S, x0, x1, x2, x3, tl.load(beta_ptr, mask=here, other=0.0)


@triton.jit(do_not_specialize=["B", "rows"])
def _kda_mixer(
    proj_ptr,
    conv_weight_ptr,
    conv_state_ptr,
    w_up_ptr,
    A_log_ptr,
    dt_bias_ptr,
    norm_weight_ptr,
    state_ptr,
    slots_ptr,
    out_ptr,
    B,
    rows,
    proj_stride,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    C: tl.constexpr = 3 * H * K
    first = tl.program_id(0) * rows
    h = tl.program_id(1)
    k = tl.arange(0, K)
    r = tl.arange(0, R)
    m = tl.arange(0, 16)
    # The state as [V, parts of K, CHUNK]: a thread then holds all parts, and sums over them by itself.
    part = tl.arange(0, K // CHUNK)
    column = tl.arange(0, CHUNK)
    S_tile = k[:, None, None] * K + part[None, :, None] * CHUNK + column[None, None, :]
    # This head's channels of q, k and v as one vector of [4, K], the last quarter unused.
    j = tl.arange(0, 4 * K)
    c = j // K * (H * K) + h * K + j % K
    c_mask = j < 3 * K

    if PDL:
        gdc_launch_dependents()
    # Weights do not depend on the kernel before this one: they may be on their way while it finishes.
    w_f_KR = tl.load(w_up_ptr + (h * K + k[:, None]) * R + r[None, :])
    w_g_VR = tl.load(w_up_ptr + H * K * R + (h * K + k[:, None]) * R + r[None, :])
    t0 = tl.load(conv_weight_ptr + c * 4, mask=c_mask, other=0.0).to(tl.float32)
    t1 = tl.load(conv_weight_ptr + c * 4 + 1, mask=c_mask, other=0.0).to(tl.float32)
    t2 = tl.load(conv_weight_ptr + c * 4 + 2, mask=c_mask, other=0.0).to(tl.float32)
    t3 = tl.load(conv_weight_ptr + c * 4 + 3, mask=c_mask, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log_ptr + h))
    dt_bias = tl.load(dt_bias_ptr + h * K + k)
    norm_weight = tl.load(norm_weight_ptr + k).to(tl.float32)
    slot = tl.load(slots_ptr + first)
    if PDL:
        gdc_wait()

    count = tl.minimum(rows, B - first)
    slot_next = tl.load(slots_ptr + first + 1, mask=count > 1, other=0)
    x_ptr = proj_ptr + first.to(tl.int64) * proj_stride
    s_ptr = conv_state_ptr + slot * 3 * C
    S_ptr = state_ptr + (slot * H + h) * K * K
    S, x0, x1, x2, x3, beta = _inputs(x_ptr, s_ptr, S_ptr, S_tile, c, c_mask, x_ptr + C + h, True, C)

    low_ptrs = x_ptr + m[:, None] * proj_stride + C + H + r[None, :]
    f_MK = dot(tl.load(low_ptrs, mask=m[:, None] < count, other=0.0), tl.trans(w_f_KR))
    g_MV = dot(tl.load(low_ptrs + R, mask=m[:, None] < count, other=0.0), tl.trans(w_g_VR))

    for i in range(count):
        more = i + 1 < count
        x_next_ptr = x_ptr + proj_stride
        s_next_ptr = conv_state_ptr + slot_next * 3 * C
        S_next_ptr = state_ptr + (slot_next * H + h) * K * K
        S_next, x0_next, x1_next, x2_next, x3_next, beta_next = _inputs(
            x_next_ptr, s_next_ptr, S_next_ptr, S_tile, c, c_mask, x_next_ptr + C + h, more, C
        )
        slot_next = tl.load(slots_ptr + first + i + 2, mask=i + 2 < count, other=0)

        f = tl.sum(tl.where(m[:, None] == i, f_MK, 0.0), 0) + dt_bias
        decay = tl.exp(rate * (tl.maximum(f, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(f)))))
        gate = norm_weight * tl.sigmoid(tl.sum(tl.where(m[:, None] == i, g_MV, 0.0), 0))
        y = x0.to(tl.float32) * t0 + x1.to(tl.float32) * t1 + x2.to(tl.float32) * t2 + x3.to(tl.float32) * t3
        y = y * tl.sigmoid(y)
        qk_v, kk_none = tl.split(tl.permute(tl.reshape(y, [2, 2, K]), [2, 0, 1]))
        q, v = tl.split(qk_v)
        kk, _ = tl.split(kk_none)
        q_sq, k_sq, q_k = tl.reduce((q * q, kk * kk, q * kk), 0, _add3)
        r_q = tl.rsqrt(q_sq + 1e-6) * (K**-0.5)
        r_k = tl.rsqrt(k_sq + 1e-6)
        q_k *= r_k
        q = tl.reshape(q, [1, K // CHUNK, CHUNK])
        kk = tl.reshape(kk, [1, K // CHUNK, CHUNK])
        decay = tl.reshape(decay, [1, K // CHUNK, CHUNK])

        D = S.to(tl.float32) * decay
        u = tl.sigmoid(beta.to(tl.float32)) * (v - tl.sum(tl.sum(D * kk, 1), 1) * r_k)
        o = (tl.sum(tl.sum(D * q, 1), 1) + u * q_k) * r_q
        D += u[:, None, None] * (kk * r_k)
        tl.store(S_ptr + S_tile, D.to(state_ptr.dtype.element_ty), cache_modifier=".cs")
        o *= tl.rsqrt(tl.sum(o * o) / K + eps) * gate
        tl.store(out_ptr + ((first + i).to(tl.int64) * H + h) * K + k, o.to(out_ptr.dtype.element_ty))
        # A vector may be held by several threads: none may still be reading what another overwrites.
        tl.debug_barrier()
        tl.store(s_ptr + c, x1, mask=c_mask)
        tl.store(s_ptr + C + c, x2, mask=c_mask)
        tl.store(s_ptr + 2 * C + c, x3.to(conv_state_ptr.dtype.element_ty), mask=c_mask)
        S, x0, x1, x2, x3, beta = S_next, x0_next, x1_next, x2_next, x3_next, beta_next
        x_ptr, s_ptr, S_ptr = x_next_ptr, s_next_ptr, S_next_ptr


def rows_per_program(B: int, H: int, processors: int) -> int:
    """Sequences of a program that take the fewest rounds over the multiprocessors, each as short as it can be."""

    def cost(rows: int) -> float:
        start = 0.8  # what a program does before its first sequence, in sequences
        return triton.cdiv(triton.cdiv(B, rows) * H, processors) * (rows + start)

    return min(range(1, MAX_ROWS + 1), key=cost)


def kda_mixer_decode(
    proj_BX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    w_up_2OR: Tensor,
    A_log_H: Tensor,
    dt_bias_HK: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> Tensor:
    B, (H, K) = slots_B.shape[0], dt_bias_HK.shape
    o_BO = torch.empty(B, H * K, dtype=proj_BX.dtype, device=proj_BX.device)
    if B:
        rows = rows_per_program(B, H, multiprocessors(proj_BX.device))
        _kda_mixer[(triton.cdiv(B, rows), H)](
            proj_BX,
            conv_weight_CW,
            conv_state_NWC,
            w_up_2OR,
            A_log_H,
            dt_bias_HK,
            norm_weight_V,
            state_NHVK,
            slots_B,
            o_BO,
            B,
            rows,
            proj_BX.stride(0),
            eps,
            H,
            K,
            w_up_2OR.shape[-1],
            CHUNK=min(K, 32 if rows <= 2 else 64),
            **pdl_options(proj_BX),
            num_warps=8,
        )
    return o_BO
