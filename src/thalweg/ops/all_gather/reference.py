"""The ranks' own collective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from thalweg.ops.all_reduce import Ranks


def all_gather(x_RN: Tensor, ranks: Ranks) -> Tensor:
    return ranks.all_gather_last(x_RN)
