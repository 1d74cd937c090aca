"""RMSNorm, alone and with the residual add that precedes it."""

from __future__ import annotations

from torch import Tensor, nn

from thalweg.layers.context import BuildContext


class RMSNorm(nn.Module):
    def __init__(self, ctx: BuildContext, width: int, eps: float) -> None:
        super().__init__()
        self.weight = ctx.weight(width)
        self.eps = eps
        self._norm = ctx.op("rms_norm", D=width)
        self._add_norm = ctx.op("add_rms_norm", D=width)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); the residual is x itself where none is given."""
        if residual_TD is None:
            return self._norm(x_TD, self.weight, self.eps), x_TD
        return self._add_norm(x_TD, residual_TD, self.weight, self.eps)
