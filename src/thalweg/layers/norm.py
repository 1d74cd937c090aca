"""RMSNorm. Layers that begin with one take it as an argument, so that it may be part of their first kernel."""

from __future__ import annotations

from torch import Tensor, nn

from thalweg.layers.context import BuildContext


class RMSNorm(nn.Module):
    def __init__(self, ctx: BuildContext, width: int, eps: float) -> None:
        super().__init__()
        self.weight = ctx.weight(width)
        self.eps = eps
        self._norm = ctx.op("rms_norm", D=width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._norm(x_TD, self.weight, self.eps)
