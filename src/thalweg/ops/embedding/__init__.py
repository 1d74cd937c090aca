"""Op "embedding": rows of a vocabulary that ranks divide."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from thalweg.ops.all_reduce import AllReduceAddDims, Ranks, few_tokens, why_not_exchanged
from thalweg.ops.embedding import reference
from thalweg.ops.registry import Op, Where, register


class Embedding(Protocol):
    def __call__(self, ids_T: Tensor, w_VD: Tensor, ranks: Ranks, /) -> Tensor:
        """x_TD of int64 ids, a row each: w has the rows of ids rank * V up to rank * V + V. All ranks call it in one
        order, with the same ids; w and x are contiguous."""


EMBEDDING: Op[AllReduceAddDims, Embedding] = Op("embedding", AllReduceAddDims)


def _cuda(where: Where, dims: AllReduceAddDims) -> Embedding:
    from thalweg.ops.embedding import cuda

    return cuda.embedding


register(EMBEDDING, "reference", lambda *_: reference.embedding)
register(EMBEDDING, "cuda", _cuda, supports=why_not_exchanged, tokens=few_tokens, priority=10)
