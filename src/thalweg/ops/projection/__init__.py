"""Op "batched_projection": two up-projections (KDA's decay and output gates) as one batched product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.linear import cpp, separate
from thalweg.ops.projection import reference
from thalweg.ops.registry import Op, register
from thalweg.ops.toolchain import cpu_build


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedProjectionDims:
    R: int  # columns of each x
    O: int  # columns of each y


class BatchedProjection(Protocol):
    def __call__(self, x_T2R: Tensor, w_2OR: Tensor, /) -> Tensor:
        """y_T2O[:, i] = x_T2R[:, i] @ w_2OR[i].T for i = 0, 1.

        x_T2R [T, 2, R] and w_2OR [2, O, R] share one dtype, which y has too; accumulation is in fp32.
        y_T2O[:, i] is a [T, O] matrix with a unit last stride, its other stride is up to the implementation.
        """


BATCHED_PROJECTION: Op[BatchedProjectionDims, BatchedProjection] = Op("batched_projection", BatchedProjectionDims)


register(BATCHED_PROJECTION, "reference", lambda *_: reference.batched_projection)
register(BATCHED_PROJECTION, "separate", lambda *_: separate.batched_projection, priority=-10)
register(BATCHED_PROJECTION, "panels", lambda *_: cpp.batched_projection, supports=cpu_build.why_not, priority=10)
