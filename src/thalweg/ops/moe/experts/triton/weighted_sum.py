"""The last launch of the experts: a token's weighted sum, and with it the own expert, the residual and the norm that
comes next.

It takes the outputs of the (token, expert) pairs, whatever kernels they come from, in one fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.products.triton import LARGEST, SMALLEST
from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def _clear(counts_ptr, experts, program, BLOCK_E: tl.constexpr):
    """By the first program: all launches that read the counts are over."""
    expert = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + expert, 0, mask=(expert < experts) & (program == 0))


@triton.jit
def weighted_sum_kernel(
    y_ptr,  # [T * K, D]
    weights_ptr,
    own_ptr,  # [T, D] of the own expert, or None
    residual_ptr,  # or None
    out_ptr,
    counts_ptr,  # of pairs by expert, which become 0, or None
    experts,
    scale,  # of the weighted sum, if there is an own expert
    residual_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if counts_ptr is not None:
        _clear(counts_ptr, experts, tl.program_id(0) + tl.program_id(1), BLOCK_E)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    ys, weights = (), ()
    for j in tl.static_range(K):
        ys = ys + (tl.load(y_ptr + (token * K + j) * D + cols, mask=inside, other=0.0),)
        weights = weights + (tl.load(weights_ptr + token * K + j),)
    own, residual = 0.0, 0.0
    if own_ptr is not None:
        own = tl.load(own_ptr + token * D + cols, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if residual_stride < 0:  # never, but the assembler does not sink loads over a branch
        return
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(K):
        # What stands there for a pair that is left out may be anything.
        total += tl.where(weights[j] != 0, weights[j] * ys[j].to(tl.float32), 0.0)
    if own_ptr is not None:
        # Rounded where the additions by themselves round (op "scaled_residual_add").
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        total = tl.fma(total.to(dtype).to(tl.float32), scale, own.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    total += residual
    tl.store(out_ptr + token * D + cols, total.to(out_ptr.dtype.element_ty), mask=inside)


MAX_NORMED = 4096  # columns of a row that a program has registers for
PART = 1024  # columns of a row at a time


@triton.jit
def weighted_sum_norm_kernel(
    y_ptr,  # [T * K, D]
    weights_ptr,
    own_ptr,  # [T, D] of the own expert, or None
    residual_ptr,  # or None
    out_ptr,
    norm_weight_ptr,
    normed_ptr,  # [T, D] in the dtype, or e4m3
    normed_scale_ptr,  # [T] of the latter, or None
    counts_ptr,  # of pairs by expert, which become 0, or None
    experts,
    scale,  # of the weighted sum, if there is an own expert
    eps,
    residual_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """weighted_sum_kernel for whole rows, and rms_norm of what it gives, perhaps in e4m3 over a scale of its row."""
    PARTS: tl.constexpr = (D + PART - 1) // PART
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, PART)
    norm_weights = ()
    for p in tl.static_range(PARTS):
        norm_weights = norm_weights + (tl.load(norm_weight_ptr + p * PART + cols, mask=p * PART + cols < D, other=0.0),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if counts_ptr is not None:
        _clear(counts_ptr, experts, tl.program_id(0), BLOCK_E)
    weights, ys, owns, residuals = (), (), (), ()
    for j in tl.static_range(K):
        weights = weights + (tl.load(weights_ptr + token * K + j),)
    for p in tl.static_range(PARTS):
        d = p * PART + cols
        for j in tl.static_range(K):
            ys = ys + (tl.load(y_ptr + (token * K + j) * D + d, mask=d < D, other=0.0),)
        if own_ptr is not None:
            owns = owns + (tl.load(own_ptr + token * D + d, mask=d < D, other=0.0),)
        if residual_ptr is not None:
            residuals = residuals + (tl.load(residual_ptr + token * residual_stride + d, mask=d < D, other=0.0),)
    if residual_stride < 0:  # never, but the assembler does not sink loads over a branch
        return
    sums = ()
    squares = tl.zeros([PART], tl.float32)
    for p in tl.static_range(PARTS):
        d = p * PART + cols
        total = tl.zeros([PART], tl.float32)
        for j in tl.static_range(K):
            # As weighted_sum_kernel: a product that is added at once would not be rounded in between.
            total += tl.where(weights[j] != 0, weights[j] * ys[p * K + j].to(tl.float32), 0.0)
        if own_ptr is not None:
            own = owns[p].to(dtype).to(tl.float32)
            total = tl.fma(total.to(dtype).to(tl.float32), scale, own).to(dtype).to(tl.float32)
        if residual_ptr is not None:
            total += residuals[p].to(tl.float32)
        rounded = total.to(dtype)
        tl.store(out_ptr + token * D + d, rounded, mask=d < D)
        squares += rounded.to(tl.float32) * rounded.to(tl.float32)
        sums = sums + (rounded,)
    r = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    normed = ()
    largest = tl.zeros([PART], tl.float32)
    for p in tl.static_range(PARTS):
        d = p * PART + cols
        n = (sums[p].to(tl.float32) * r * norm_weights[p].to(tl.float32)).to(dtype)
        if normed_scale_ptr is None:
            tl.store(normed_ptr + token * D + d, n, mask=d < D)
        else:
            normed = normed + (n.to(tl.float32),)
            largest = tl.maximum(largest, tl.abs(n.to(tl.float32)))
    if normed_scale_ptr is not None:
        normed_scale = tl.maximum(tl.max(largest, 0), SMALLEST) * (1 / LARGEST)
        tl.store(normed_scale_ptr + token, normed_scale)
        for p in tl.static_range(PARTS):
            d = p * PART + cols
            q = (normed[p] * (1 / normed_scale)).to(normed_ptr.dtype.element_ty)
            tl.store(normed_ptr + token * D + d, q, mask=d < D)


def weighted_sum_norm(
    y_PD: Tensor,
    weights_Tk: Tensor,
    out_TD: Tensor,
    normed_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
    normed_scale_T: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> None:
    """out_TD as `weighted_sum` gives it, bit for bit, and "rms_norm" of it into normed_TD, of rows of at most
    MAX_NORMED; with normed_scale_T in e4m3, over a scale of each row. counts_E as there."""
    (T, K), D = weights_Tk.shape, y_PD.shape[1]
    weighted_sum_norm_kernel[(T,)](
        y_PD,
        weights_Tk,
        own_TD,
        residual_TD,
        out_TD,
        norm_weight_D,
        normed_TD,
        normed_scale_T,
        counts_E,
        0 if counts_E is None else len(counts_E),
        float(scale),
        eps,
        0 if residual_TD is None else residual_TD.stride(0),
        D=D,
        K=K,
        PART=min(PART, triton.next_power_of_2(D)),
        BLOCK_E=1 if counts_E is None else triton.next_power_of_2(len(counts_E)),
        num_warps=8,
        **pdl_options(y_PD),
    )


def weighted_sum(
    y_PD: Tensor,
    weights_Tk: Tensor,
    out_TD: Tensor,
    residual_TD: Tensor | None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
    block: int = 256,
    warps: int = 2,
    counts_E: Tensor | None = None,
) -> Tensor:
    """out_TD, rounded once to its dtype: the outputs [T * k, D] of all pairs, a token's k in a row, weighted and summed
    in fp32, plus the residual. With own_TD, the residual + (own + scale * the sum), each rounded. All but the residual
    are contiguous. Counts of pairs, int32 [E], if they are given, become 0."""
    (T, K), D = weights_Tk.shape, y_PD.shape[1]
    weighted_sum_kernel[(T, triton.cdiv(D, block))](
        y_PD,
        weights_Tk,
        own_TD,
        residual_TD,
        out_TD,
        counts_E,
        0 if counts_E is None else len(counts_E),
        float(scale),
        0 if residual_TD is None else residual_TD.stride(0),
        D=D,
        K=K,
        BLOCK_D=block,
        BLOCK_E=1 if counts_E is None else triton.next_power_of_2(len(counts_E)),
        num_warps=warps,
        **pdl_options(y_PD),
    )
    return out_TD
