"""Op "all_gather": all ranks' rows side by side, as logits of a vocabulary that ranks divide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.all_gather import cuda, reference
from thalweg.ops.all_reduce import Ranks
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.toolchain import cuda_build


@dataclass(frozen=True, slots=True, kw_only=True)
class AllGatherDims:
    row_bytes: int  # of one rank
    ranks: int
    mapped: bool  # whether ranks map each other's memory


class AllGather(Protocol):
    def __call__(self, x_RN: Tensor, ranks: Ranks, /) -> Tensor:
        """y [R, ranks * N] of x's dtype, in the order of the ranks. x has a unit last stride, y is contiguous. All
        ranks call it in one order, with as many rows."""


ALL_GATHER: Op[AllGatherDims, AllGather] = Op("all_gather", AllGatherDims)


def _cuda_refuses(where: Where, dims: AllGatherDims) -> Refusal:
    if not dims.mapped:
        return "needs ranks that map each other's memory"
    if dims.row_bytes % 8 or not dims.row_bytes:
        return f"needs rows of a multiple of 8 bytes, not {dims.row_bytes}"
    if not _few(dims).last:
        return f"has no room for rows of {dims.row_bytes} bytes"
    return cuda_build.why_not(where)


def _few(dims: AllGatherDims) -> Tokens:
    return Tokens(last=cuda.most_rows(dims.row_bytes, dims.ranks))


register(ALL_GATHER, "reference", lambda *_: reference.all_gather)
register(ALL_GATHER, "cuda", lambda *_: cuda.all_gather, supports=_cuda_refuses, tokens=_few, priority=10)
