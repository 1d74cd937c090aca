"""Heads split and merged by torch's own reshapes."""

from __future__ import annotations

from torch import Tensor


def split_heads(x_TO: Tensor, *, width: int) -> Tensor:
    x_THX: Tensor = x_TO.unflatten(-1, (-1, width))  # t (h d) -> t h d
    return x_THX


def merge_heads(x_THX: Tensor) -> Tensor:
    return x_THX.flatten(1)  # t h d -> t (h d)
