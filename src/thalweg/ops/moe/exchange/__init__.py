"""Ops "expert_dispatch" and "expert_combine": tokens go to experts that data-parallel ranks divide, and what these give
comes back, in shapes that do not depend on who chose what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from thalweg.ops.all_reduce import AREAS, MANY_TOKENS, ROWS
from thalweg.ops.moe.exchange import reference
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.toolchain import cuda_build, triton_support


class PeerMemory(Protocol):
    @property
    def areas(self) -> Sequence[Any]: ...


class Ranks(Protocol):
    """Those that divide the experts: DataRanks."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def peers(self) -> PeerMemory | None: ...
    def gather(self, x_TD: Tensor, /) -> Tensor: ...
    def all_to_all(self, rows_ND: Tensor, sent: Sequence[int], received: Sequence[int], /) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDispatchDims:
    D: int
    K: int  # experts of a token that the ranks divide
    S: int  # further ones of a token, which every rank has
    here: int  # of the former, on each rank
    ranks: int
    mapped: bool  # whether ranks map each other's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCombineDims:
    D: int
    parts: int  # experts per token
    ranks: int
    mapped: bool


class Gathered(NamedTuple):
    """R rows of each rank, those of rank 0 first, and what each takes on this one: the number of an expert here, or -1
    and weight 0."""

    x_AD: Tensor
    weights_Ak: Tensor  # fp32
    ids_Ak: Tensor  # int64


class ExpertDispatch(Protocol):
    def __call__(
        self,
        live_R: Tensor,
        x_TD: Tensor,
        weights_Tk: Tensor,
        slots_Tk: Tensor,
        ranks: Ranks,
        /,
        *,
        here: int,
        shared: int,
    ) -> Gathered:
        """Every rank's tokens, of which this one has T, padded to R rows. Slots are int64 [T, K + shared]: rank r has
        slots r * here to (r + 1) * here - 1 as its experts 0 to here - 1; the last `shared` of a token are experts from
        `here` on of its own rank, whatever stands there. A token takes none if its live_R, int64, is 0; nor does a row
        past the T. x has a unit last stride, the others are contiguous. All ranks call it in one order, for one R, the
        rows that it is chosen by."""


class ExpertCombine(Protocol):
    def __call__(
        self,
        live_R: Tensor,
        residual_TD: Tensor,
        parts_PD: Tensor,
        ranks: Ranks,
        /,
        *,
        weights_Ak: Tensor | None = None,
        own_TD: Tensor | None = None,
    ) -> Tensor:
        """y_TD = residual + own_TD, fp32, if there is one, + what all ranks' experts gave for this rank's tokens, in
        the order of the ranks. These tokens are the first T of its R rows that "expert_dispatch" gave.

        A rank gives parts [A, D] of all ranks' tokens in x's dtype, or, with weights_Ak, k rows of parts [A * k, D] of
        each, in that or fp32, times these, summed in fp32; a row whose weight is 0 is left out, whatever stands there.
        What a rank gives for a token is rounded to the residual's dtype. The residual has a unit last stride, the
        others are contiguous."""


EXPERT_DISPATCH: Op[ExpertDispatchDims, ExpertDispatch] = Op("expert_dispatch", ExpertDispatchDims)
EXPERT_COMBINE: Op[ExpertCombineDims, ExpertCombine] = Op("expert_combine", ExpertCombineDims)
MANY_ROWS = 160  # of a rank, from which on less is written for each


def areas_of(ranks: int) -> tuple[tuple[int, int], ...]:
    """Of data-parallel ranks, as AREAS of tensor-parallel ones: none for sums within a projection, and that of many
    tokens divided by the ranks."""
    blocks, place_bytes = AREAS[MANY_TOKENS]
    return AREAS[ROWS], (0, 0), (blocks, 2 * place_bytes // ranks // 16 * 16)


def _dispatch_refuses(where: Where, dims: ExpertDispatchDims) -> Refusal:
    return _why_not(where, dims.mapped, dims.D, dims.ranks)


def _combine_refuses(where: Where, dims: ExpertCombineDims) -> Refusal:
    return _why_not(where, dims.mapped, dims.D, dims.ranks)


def _why_not(where: Where, mapped: bool, D: int, ranks: int) -> Refusal:
    if ranks == 1:
        return "needs several ranks"
    if not mapped:
        return "needs ranks that map each other's memory"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    if D % 8 or not D:
        return f"needs D to be a multiple of 8, not {D}"
    return cuda_build.why_not(where)


def _cuda_dispatch(where: Where, dims: ExpertDispatchDims, *, many: bool = False) -> ExpertDispatch:
    from thalweg.ops.moe.exchange import cuda

    return partial(cuda.dispatch, many=many)


def _cuda_combine(where: Where, dims: ExpertCombineDims, *, many: bool = False) -> ExpertCombine:
    from thalweg.ops.moe.exchange import cuda

    return partial(cuda.combine, many=many)


def _separate(where: Where, dims: ExpertCombineDims) -> ExpertCombine:
    from thalweg.ops.moe.exchange import cuda

    return cuda.combine_separate


register(EXPERT_DISPATCH, "reference", lambda *_: reference.dispatch)
register(EXPERT_COMBINE, "reference", lambda *_: reference.combine)
register(EXPERT_COMBINE, "separate", _separate, supports=lambda where, _: triton_support.why_not(where), priority=5)
register(EXPERT_DISPATCH, "cuda", _cuda_dispatch, supports=_dispatch_refuses, priority=10)
register(EXPERT_COMBINE, "cuda", _cuda_combine, supports=_combine_refuses, priority=10)
_many: dict[str, Any] = {"tokens": Tokens(first=MANY_ROWS), "priority": 15}
register(EXPERT_DISPATCH, "cuda_many", partial(_cuda_dispatch, many=True), supports=_dispatch_refuses, **_many)
register(EXPERT_COMBINE, "cuda_many", partial(_cuda_combine, many=True), supports=_combine_refuses, **_many)
