"""RMSNorm, by itself or as the weight that a layer's first kernel takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.layers.context import BuildContext
from thalweg.ops.norm import RMS_NORM, RmsNormDims


class NormWeight(nn.Module):
    """Weight [width] and epsilon of a norm that its owner computes inside an op of its own."""

    def __init__(self, ctx: BuildContext, width: int, eps: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = ctx.weight(width, dtype=dtype or (torch.float32 if ctx.norm_fp32 else None))
        self.eps = eps


class RMSNorm(NormWeight):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""

    def __init__(self, ctx: BuildContext, width: int, eps: float) -> None:
        super().__init__(ctx, width, eps)
        self._norm = ctx.op(RMS_NORM, RmsNormDims(D=width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._norm(x_TD, self.weight, self.eps)
