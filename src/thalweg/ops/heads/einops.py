"""Heads split and merged by einops, which parses its patterns at run time: to be measured against, not to be used."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def split_heads(x_TO: Tensor, *, width: int) -> Tensor:
    return rearrange(x_TO, "t (h d) -> t h d", d=width)


def merge_heads(x_THX: Tensor) -> Tensor:
    return rearrange(x_THX, "t h d -> t (h d)")
