"""Op "embedding": rows of a vocabulary that ranks divide. Op "vocab_rows": rows of one that is here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from thalweg.ops.all_reduce import AllReduceAddDims, Ranks, few_tokens, why_not_exchanged, why_not_many
from thalweg.ops.embedding import cpp, cuda, reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build
from thalweg.quant import scheme_named


class Embedding(Protocol):
    def __call__(self, ids_T: Tensor, w_VD: Tensor, ranks: Ranks, /) -> Tensor:
        """x_TD of int64 ids, a row each: w has the rows of ids rank * V up to rank * V + V. All ranks call it in one
        order, with the same ids; w and x are contiguous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabRowsDims:
    D: int
    scheme: str  # that the vocabulary is stored in


class VocabRows(Protocol):
    def __call__(self, ids_T: Tensor, w: Tensor, /) -> Tensor:
        """x_TD in the model's dtype of int64 ids, a row each of w, which has rows [V, D] as the scheme stores them.
        Raises IndexError if an id is none of V, on a CPU."""


EMBEDDING: Op[AllReduceAddDims, Embedding] = Op("embedding", AllReduceAddDims)
VOCAB_ROWS: Op[VocabRowsDims, VocabRows] = Op("vocab_rows", VocabRowsDims)


def _vocab_rows(where: Where, dims: VocabRowsDims) -> VocabRows:
    return partial(reference.vocab_rows, scheme=scheme_named(dims.scheme), dtype=getattr(torch, where.dtype))


def _cpp_vocab_rows(where: Where, dims: VocabRowsDims) -> VocabRows:
    return cpp.build(dims, getattr(torch, where.dtype))


def _cpp_refuses(where: Where, dims: VocabRowsDims) -> Refusal:
    return cpp.refusal(dims) or cpu_build.why_not(where)


register(EMBEDDING, "reference", lambda *_: reference.embedding)
register(EMBEDDING, "cuda_many", lambda *_: cuda.embedding_many, supports=why_not_many, priority=5)
register(EMBEDDING, "cuda", lambda *_: cuda.embedding, supports=why_not_exchanged, tokens=few_tokens, priority=10)

register(VOCAB_ROWS, "reference", _vocab_rows)
register(VOCAB_ROWS, "cpp", _cpp_vocab_rows, supports=_cpp_refuses, priority=10)
