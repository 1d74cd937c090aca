"""Arrays without equal items, of a few values."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations
from math import comb, perm
from typing import Any

from thalweg.server.json_schema.document import same

MAX_ARRAYS = 500


def distinct_arrays(values: list[Any], least: int, most: int | None) -> list[list[Any]] | None:
    """Arrays of distinct `values`, as far as they can be listed: in every order, else in the order of `values`, else
    short ones. None if there are none of `least` items."""
    distinct = list({same(value): value for value in values}.values())
    most = len(distinct) if most is None else min(most, len(distinct))
    for count, arrange in ((perm, permutations), (comb, combinations)):
        if _fits(least, most, lambda k, count=count: count(len(distinct), k)) == most:  # type: ignore[misc]
            return [list(a) for k in range(least, most + 1) for a in arrange(distinct, k)] or None
    most = _fits(least, most, lambda k: perm(len(distinct), k))
    return [list(a) for k in range(least, most + 1) for a in permutations(distinct, k)] or None


def _fits(least: int, most: int, count: Callable[[int], int]) -> int:
    """The greatest length up to `most` for which arrays from `least` on are few enough; below `least` if none is."""
    total = 0
    for length in range(least, most + 1):
        total += count(length)
        if total > MAX_ARRAYS:
            return length - 1
    return most
