"""Op "sample": one token id per row of logits, greedy or drawn, without a generator's state. "sample_over_ranks" is the
same of logits that ranks have parts of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from thalweg.ops.all_reduce import AREAS, ROWS, Ranks
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.sample import cpp, over_ranks, reference
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDims:
    V: int  # size of the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOverRanksDims:
    V: int  # size of the vocabulary
    ranks: int
    mapped: bool  # whether ranks map each other's memory


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
        gives -1 instead of an id. logits_RV is fp32 or bf16 with a unit last stride, the arithmetic fp32;
        temperatures_R is fp32 >= 0. Implementations agree up to the rounding of the logarithm.
        """


class SampleOverRanks(Protocol):
    def __call__(
        self,
        logits_RV: Tensor,
        temperatures_N: Tensor,
        seeds_N: Tensor,
        positions_R: Tensor,
        slots_R: Tensor,
        ranks: Ranks,
        /,
    ) -> Tensor:
        """The ids that "sample" with `check` gives of all ranks' logits side by side, on every rank. Each has as many
        columns, and what lies beyond the vocabulary does not count. All ranks call it in one order, for as many rows.
        """


SAMPLE: Op[SampleDims, Sample] = Op("sample", SampleDims)
SAMPLE_OVER_RANKS: Op[SampleOverRanksDims, SampleOverRanks] = Op("sample_over_ranks", SampleOverRanksDims)


def _triton(where: Where, dims: SampleDims) -> Sample:
    from thalweg.ops.sample import triton

    return triton.sample


register(SAMPLE, "reference", lambda *_: reference.sample)
register(SAMPLE, "cpp", lambda *_: cpp.sample, supports=cpu_build.why_not, priority=10)
register(SAMPLE, "triton", _triton, supports=why_not, priority=10)


def _over_ranks(where: Where, dims: SampleOverRanksDims) -> SampleOverRanks:
    return partial(reference.sample_over_ranks, vocab=dims.V)


def _cuda_over_ranks(where: Where, dims: SampleOverRanksDims) -> SampleOverRanks:
    return partial(over_ranks.sample_over_ranks, vocab=dims.V)


def _cuda_over_ranks_refuses(where: Where, dims: SampleOverRanksDims) -> Refusal:
    if not dims.mapped:
        return "needs ranks that map each other's memory"
    if -(-dims.V // dims.ranks) * (dims.ranks - 1) >= dims.V:
        return f"needs a part of the vocabulary for each rank, not {dims.V} ids for {dims.ranks}"
    return why_not(where) or cuda_build.why_not(where)


register(SAMPLE_OVER_RANKS, "reference", _over_ranks)
register(
    SAMPLE_OVER_RANKS,
    "cuda",
    _cuda_over_ranks,
    supports=_cuda_over_ranks_refuses,
    tokens=Tokens(last=AREAS[ROWS][0]),
    priority=10,
)
