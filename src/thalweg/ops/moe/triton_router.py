"""Residual add, RMSNorm and router in two launches: sums and products split over programs, then a program a token.

The scale of a norm is one number a row, so that products with norm_weight * row can begin before it is known. One
launch, in which the last program to finish chooses, was slower at every size: its wait is longer than a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe import reference
from thalweg.ops.norm.triton import rms_scale, row_block
from thalweg.ops.triton_dot import dot
from thalweg.ops.triton_launch import pdl_options

MAX_TOKENS = 512


@triton.jit
def sums_and_products_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    w_ptr,
    sum_ptr,
    partial_ptr,  # [splits, T, E] fp32
    T,
    x_stride,
    residual_stride,
    w_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """x + residual, and its products with norm_weight * w over BLOCK_D columns."""
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    if PDL:
        gdc_launch_dependents()
    experts = block * BLOCK_E + tl.arange(0, BLOCK_E)
    cols = split * BLOCK_D + tl.arange(0, BLOCK_D)
    w_ptrs = w_ptr + tl.minimum(experts, E - 1)[None, :] * w_stride + cols[:, None]
    w = tl.load(w_ptrs, mask=(cols < D)[:, None], other=0.0)
    norm_weight = tl.load(norm_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.minimum(tokens, T - 1)[:, None].to(tl.int64)
    inside = (cols < D)[None, :]
    x = tl.load(x_ptr + rows * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + rows * residual_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    total = (x + residual).to(sum_ptr.dtype.element_ty)
    if block == 0:
        tl.store(sum_ptr + rows * D + cols[None, :], total, mask=inside & (tokens < T)[:, None])
    a = total.to(tl.float32) * norm_weight[None, :]
    # In bf16 two terms hold the product of two bf16 numbers to its last bit but one; in fp32 the second is zero.
    high = a.to(w.dtype)
    logits = dot(high, w)
    if w.dtype != tl.float32:
        logits += dot((a - high.to(tl.float32)).to(w.dtype), w)
    here = (tokens < T)[:, None] & (experts < E)[None, :]
    tl.store(partial_ptr + (split * T + tokens)[:, None] * E + experts[None, :], logits, mask=here)


@triton.jit
def choose_kernel(
    partial_ptr,  # [SPLITS, T, E] fp32
    sum_ptr,
    norm_ptr,
    bias_ptr,
    normed_ptr,
    weights_ptr,
    ids_ptr,
    eps,
    scale,
    T,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E2: tl.constexpr,  # E as a power of two
    K2: tl.constexpr,  # K + SHARED as a power of two
    PDL: tl.constexpr,
):
    """A token's norm, the scores that follow from its scale, and the choice."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, E2)
    inside = columns < E
    norm_weight = tl.load(norm_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    row = tl.load(sum_ptr + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    logits = tl.zeros([E2], tl.float32)
    for s in tl.static_range(SPLITS):
        logits += tl.load(partial_ptr + (s * T + token) * E + columns, mask=inside, other=0.0)
    rms = rms_scale(row, eps, D)
    tl.store(normed_ptr + token * D + cols, (row * rms * norm_weight).to(normed_ptr.dtype.element_ty), mask=cols < D)
    logits *= rms
    if SOFTMAX:
        logits = tl.where(inside, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores + bias
    # NaN ranks last and equals rank by index, so that every id is in range and different from the others.
    choice = tl.where(choice == choice, choice, float("-inf"))
    bits = choice.to(tl.int32, bitcast=True)
    # As integers, in the same order: a warp finds the largest of those in one instruction.
    order = tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -(2**31))
    slots = tl.arange(0, K2)
    ids = E - K + slots
    for j in tl.static_range(K):
        best = tl.min(tl.where(order == tl.max(order, 0), columns, E2), 0)
        order = tl.where(columns == best, -(2**31), order)
        ids = tl.where(slots == j, best, ids)
    routed = tl.gather(scores, tl.where(slots < K, ids, 0), 0)
    if RENORMALIZE:
        routed = routed / (tl.sum(tl.where(slots < K, routed, 0.0), 0) + 1e-20)
    out = token * (K + SHARED) + slots
    tl.store(weights_ptr + out, tl.where(slots < K, routed * scale, 1.0), mask=slots < K + SHARED)
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=slots < K + SHARED)


def add_norm_router(
    x_TD: Tensor,
    residual_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    w_ED: Tensor,
    bias_E: Tensor,
    top_k: int,
    renormalize: bool,
    scale: float,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, D), E = x_TD.shape, w_ED.shape[0]
    served = 0 < T <= MAX_TOKENS and n_group == 1 and x_TD.dtype == w_ED.dtype and scoring in ("sigmoid", "softmax")
    if not served or any(t.stride(1) != 1 for t in (x_TD, residual_TD, w_ED)):
        routing = (w_ED, bias_E, top_k, renormalize, scale, scoring, n_group, topk_group, num_shared)
        return reference.add_norm_router(x_TD, residual_TD, norm_weight_D, eps, *routing)
    k, device = top_k + num_shared, x_TD.device
    block_t, block_e, block_d = 16, 32, 128
    splits = triton.cdiv(D, block_d)
    partial = torch.empty(splits, T, E, dtype=torch.float32, device=device)
    sum_TD, normed_TD = (torch.empty(T, D, dtype=x_TD.dtype, device=device) for _ in range(2))
    weights_Tk = torch.empty(T, k, dtype=torch.float32, device=device)
    ids_Tk = torch.empty(T, k, dtype=torch.int64, device=device)
    pdl = pdl_options(x_TD)
    sums_and_products_kernel[(triton.cdiv(E, block_e) * splits, triton.cdiv(T, block_t))](
        x_TD,
        residual_TD,
        norm_weight_D,
        w_ED,
        sum_TD,
        partial,
        T,
        x_TD.stride(0),
        residual_TD.stride(0),
        w_ED.stride(0),
        D=D,
        E=E,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_D=block_d,
        num_warps=4,
        **pdl,
    )
    row, warps = row_block(D)
    choose_kernel[(T,)](
        partial,
        sum_TD,
        norm_weight_D,
        bias_E,
        normed_TD,
        weights_Tk,
        ids_Tk,
        eps,
        float(scale),
        T,
        D=D,
        SPLITS=splits,
        E=E,
        K=top_k,
        SHARED=num_shared,
        SOFTMAX=scoring == "softmax",
        RENORMALIZE=renormalize,
        BLOCK_D=row,
        E2=triton.next_power_of_2(E),
        K2=triton.next_power_of_2(k),
        num_warps=warps,
        **pdl,
    )
    return normed_TD, sum_TD, weights_Tk, ids_Tk
