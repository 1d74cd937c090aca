"""Op "sample": one token id per row of logits, greedy or drawn, without a generator's state."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.registry import register
from thalweg.ops.sample import reference
from thalweg.ops.toolchain.triton_support import why_not


class Sample(Protocol):
    def __call__(
        self,
        logits_RV: Tensor,
        temperatures_R: Tensor,
        seeds_R: Tensor,
        positions_R: Tensor,
        slots_R: Tensor | None = None,
        /,
        *,
        check: bool = False,
    ) -> Tensor:
        """ids_R int64: the argmax of a row at temperature 0, otherwise a draw from softmax(logits / temperature).

        The draw is argmax(logits / temperature + Gumbel noise), the noise of an entry depending on its row's
        seed and position (int64) and its vocabulary index alone, so that batching cannot change it. Equal values go
        to the lowest index; NaN logits never win unless all are. With slots_R (int64), temperatures and seeds are
        tables [N] from which row r takes entry slots_R[r]. With `check`, a row of which any logit is NaN or infinite
        gives -1 instead of an id. logits_RV is fp32 or bf16, the arithmetic
        fp32; temperatures_R is fp32 >= 0. Implementations agree up to the rounding of the logarithm.
        """


def _triton(*args: Any, check: bool = False) -> Tensor:
    from thalweg.ops.sample import triton

    return triton.sample(*args, check=check)


_sample: Sample = reference.sample
_triton_sample: Sample = _triton
register("sample", "reference", _sample)
register("sample", "triton", _triton_sample, supports=why_not, priority=10)
