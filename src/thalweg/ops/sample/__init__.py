"""Op "sample": one token id per row of logits, greedy or drawn, without a generator's state."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.registry import register
from thalweg.ops.sample import reference
from thalweg.ops.triton_support import why_not


class Sample(Protocol):
    def __call__(
        self,
        logits_RV: Tensor,
        temperatures_R: Tensor,
        seeds_R: Tensor,
        positions_R: Tensor,
        /,
        refuse_non_finite: bool = False,
    ) -> Tensor:
        """ids_R int64: the argmax of a row at temperature 0, otherwise a draw from softmax(logits / temperature).

        The draw is argmax(logits / temperature + Gumbel noise), the noise of an entry depending on its row's
        seed and position (int64) and its vocabulary index alone, so that batching cannot change it. Equal values go
        to the lowest index; NaN logits never win unless all are. With refuse_non_finite the id of a row
        that has an infinity or a NaN is -1. logits_RV is fp32 or bf16, the arithmetic
        fp32; temperatures_R is fp32 >= 0. Implementations agree up to the rounding of the logarithm.
        """


def _triton(*args: Any, **options: Any) -> Tensor:
    from thalweg.ops.sample import triton

    return triton.sample(*args, **options)


_sample: Sample = reference.sample
_triton_sample: Sample = _triton
register("sample", "reference", _sample)
register("sample", "triton", _triton_sample, supports=why_not, priority=10)
