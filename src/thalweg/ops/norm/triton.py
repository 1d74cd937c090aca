"""RMS norms as Triton kernels, one program per row. Weights are loaded while the kernel before still runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.triton_launch import pdl_options


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
        # The rounding point of the contract: the norm is of the sum as it is stored.
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + d, total, mask=inside)
        x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    D = x_TD.shape[-1]
    x = x_TD.reshape(-1, D)
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = y_TD if residual_TD is None else torch.empty_like(y_TD)
    residual = x if residual_TD is None else residual_TD.reshape(-1, D)
    if y_TD.numel():
        block = triton.next_power_of_2(D)
        _rms_norm[(x.shape[0],)](
            x,
            residual,
            weight_D,
            y_TD,
            sum_TD,
            x.stride(0),
            residual.stride(0),
            eps,
            D,
            block,
            residual_TD is not None,
            num_warps=min(8, max(1, block // 512)),
            **pdl_options(x_TD),
        )
    return y_TD, sum_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _launch(x_TD, None, weight_D, eps)[0]


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch(x_TD, residual_TD, weight_D, eps)
