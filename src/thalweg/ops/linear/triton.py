"""Linear projections on a GPU: kernels of our own where few tokens make them faster, the library's beyond.

The library's cannot load weights before the kernel ahead is done, which matters while a projection takes microseconds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.linear.triton_few import few_tokens
from thalweg.ops.linear.triton_gemv import gemv
from thalweg.ops.norm.triton import rms_norm

GEMV_TOKENS = 2
ADD_TOKENS = 16  # of linear_add, whose weights have few rows; with many rows the library is as fast


def _few(most: int, x_TD: Tensor, *others: Tensor) -> bool:
    return 0 < x_TD.shape[0] <= most and all(t.stride(-1) == 1 for t in (x_TD, *others))


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return gemv(x_TD, w_OD) if _few(GEMV_TOKENS, x_TD, w_OD) else F.linear(x_TD, w_OD)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    # With the norm in the projection's own kernel, registers hold fewer of the weights: slower at every size.
    return linear(rms_norm(x_TD, norm_weight_D, eps), w_OD)


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    if _few(GEMV_TOKENS, x_TD, w_OD, residual_TO):
        return gemv(x_TD, w_OD, residual_TO)
    if _few(ADD_TOKENS, x_TD, w_OD, residual_TO) and x_TD.dtype == torch.bfloat16 and w_OD.shape[1] <= 4096:
        return few_tokens(x_TD, w_OD, residual_TO=residual_TO, blocks=1, split=4, ahead=16, maxnreg=128)
    return residual_TO.addmm_(x_TD, w_OD.T)
