"""RMS norm as a Triton kernel, one program per row. Weights are loaded while the kernel before still runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def load_row(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def store_normed(x, weight, y_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The row x, normed, to y_ptr."""
    d = tl.arange(0, BLOCK_D)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    tl.store(y_ptr + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _rms_norm(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    weight = load_row(weight_ptr, D, BLOCK_D)
    if PDL:
        gdc_wait()
    store_normed(load_row(x_ptr + row * x_stride, D, BLOCK_D), weight, y_ptr + row * D, eps, D, BLOCK_D)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    D = x_TD.shape[-1]
    x = x_TD.reshape(-1, D)
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if y_TD.numel():
        block = triton.next_power_of_2(D)
        warps = min(8, max(1, block // 512))
        _rms_norm[(x.shape[0],)](x, weight_D, y_TD, x.stride(0), eps, D, block, num_warps=warps, **pdl_options(x_TD))
    return y_TD
