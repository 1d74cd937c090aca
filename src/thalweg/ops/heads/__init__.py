"""Ops "split_heads" and "merge_heads": the heads of a token as a dimension of their own, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from thalweg.ops.heads import reference
from thalweg.ops.registry import Op, Refusal, Where, register


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsDims:
    X: int  # width of a head


class SplitHeads(Protocol):
    def __call__(self, x_TO: Tensor, /) -> Tensor:
        """x_THX of x_TO with O = H * X, any H: a view, whatever the row stride is."""


class MergeHeads(Protocol):
    def __call__(self, x_THX: Tensor, /) -> Tensor:
        """x_TO of x_THX with O = H * X: a view of contiguous tokens, and a copy otherwise."""


SPLIT_HEADS: Op[HeadsDims, SplitHeads] = Op("split_heads", HeadsDims)
MERGE_HEADS: Op[HeadsDims, MergeHeads] = Op("merge_heads", HeadsDims)


def _einops_split(where: Where, dims: HeadsDims) -> SplitHeads:
    from thalweg.ops.heads.einops import split_heads

    return partial(split_heads, width=dims.X)


def _einops_merge(where: Where, dims: HeadsDims) -> MergeHeads:
    from thalweg.ops.heads.einops import merge_heads

    return merge_heads


def _einops_refuses(where: Where, dims: HeadsDims) -> Refusal:
    return "einops is not installed; pip install einops" if find_spec("einops") is None else None


register(SPLIT_HEADS, "reference", lambda _, dims: partial(reference.split_heads, width=dims.X), recordable=True)
register(SPLIT_HEADS, "einops", _einops_split, supports=_einops_refuses, priority=-10)
register(MERGE_HEADS, "reference", lambda *_: reference.merge_heads, recordable=True)
register(MERGE_HEADS, "einops", _einops_merge, supports=_einops_refuses, priority=-10)
