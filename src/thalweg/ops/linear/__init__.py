"""Op "linear": x @ w.T without bias."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from thalweg.ops.linear import reference
from thalweg.ops.registry import register


class Linear(Protocol):
    def __call__(self, x_TD: Tensor, w_OD: Tensor, /) -> Tensor:
        """y_TO = x_TD @ w_OD.T, accumulated in fp32 and rounded once to the dtype that x and w share.

        x and w have a unit last stride; y is contiguous. T may be 0.
        """


_linear: Linear = reference.linear
register("linear", "reference", _linear)
