"""Op "all_reduce_add": what every sublayer ends in if several ranks share it, the sum over ranks and the residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.all_reduce import reference
from thalweg.ops.norm import NextNorm
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceAddDims:
    D: int
    ranks: int
    mapped: bool  # whether ranks map each other's memory, in AREAS


class Area(Protocol):
    """Memory of all ranks where blocks of a kernel meet (parallel/peers.py)."""

    @property
    def table(self) -> Tensor: ...
    @property
    def blocks(self) -> int: ...
    @property
    def place_bytes(self) -> int: ...


class PeerMemory(Protocol):
    @property
    def areas(self) -> Sequence[Any]: ...


class Ranks(Protocol):
    """Those that a sum goes over: a Mesh."""

    @property
    def tp_rank(self) -> int: ...
    @property
    def tp_size(self) -> int: ...
    @property
    def peers(self) -> PeerMemory | None: ...
    def all_reduce(self, x: Tensor, /) -> Tensor: ...
    def all_gather_last(self, x: Tensor, /) -> Tensor: ...


class AllReduceAdd(Protocol):
    def __call__(
        self,
        residual_TD: Tensor,
        parts_PD: Tensor,
        ranks: Ranks,
        /,
        *,
        weights_Tk: Tensor | None = None,
        own_TD: Tensor | None = None,
        scale: float = 1.0,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        """y_TD = residual + the sum over ranks of what each gives, the same bits on every rank, and in every run.

        A rank gives parts [T, D], or, with weights_Tk fp32, a token's k rows of parts [T * k, D] times them, summed in
        fp32; with own_TD, that and own + scale * it. What it gives is rounded to the dtype, as is what own is added to.
        Parts are in the residual's dtype, or fp32 if there are weights, and own in either. Whether the sum over ranks
        is rounded before the residual is added is open. next_norm is of y, and told if it is computed on the way. All
        have a unit last stride; the residual and parts without weights have any row stride, the others are contiguous.
        All ranks call it in one order, for as many tokens.
        """


ALL_REDUCE_ADD: Op[AllReduceAddDims, AllReduceAdd] = Op("all_reduce_add", AllReduceAddDims)

ROWS, SUMS, MANY_TOKENS = 0, 1, 2
AREAS = ((2048, 4096), (256, 16384), (264, 82048))
"""Blocks that may meet, and bytes that one of them writes for one rank: in the area of rows, in that of sums within a
projection, and in that of many tokens."""


def areas_of(ranks: int) -> tuple[tuple[int, int], ...]:
    """Those that so many ranks have a use for: many tokens go straight from rank to rank if there are two."""
    return AREAS if ranks == 2 else AREAS[:MANY_TOKENS]


def why_not_exchanged(where: Where, dims: AllReduceAddDims) -> Refusal:
    """Why ranks cannot write rows to one another."""
    if not dims.mapped:
        return "needs ranks that map each other's memory"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    if dims.D % 8 or not dims.D:
        return f"needs D to be a multiple of 8, not {dims.D}"
    return cuda_build.why_not(where)


def few_tokens(dims: AllReduceAddDims) -> Tokens:
    """Those whose rows ranks write to one another."""
    from thalweg.ops.all_reduce.cuda import most_tokens

    return Tokens(last=most_tokens(dims.D, dims.ranks))


def _cuda(where: Where, dims: AllReduceAddDims) -> AllReduceAdd:
    from thalweg.ops.all_reduce import cuda

    return cuda.all_reduce_add


def _separate(where: Where, dims: AllReduceAddDims) -> AllReduceAdd:
    from thalweg.ops.all_reduce import cuda

    return cuda.all_reduce_add_separate


def why_not_many(where: Where, dims: AllReduceAddDims) -> Refusal:
    """Why ranks cannot exchange many tokens' rows."""
    return f"needs 2 ranks, not {dims.ranks}" if dims.ranks != 2 else why_not_exchanged(where, dims)


def _many(where: Where, dims: AllReduceAddDims) -> AllReduceAdd:
    from thalweg.ops.all_reduce import cuda

    return cuda.all_reduce_add_many


register(ALL_REDUCE_ADD, "reference", lambda *_: reference.all_reduce_add)
register(ALL_REDUCE_ADD, "separate", _separate, supports=lambda where, _: why_not(where), priority=3)
register(ALL_REDUCE_ADD, "cuda_many", _many, supports=why_not_many, priority=5)
register(ALL_REDUCE_ADD, "cuda", _cuda, supports=why_not_exchanged, tokens=few_tokens, priority=10)
