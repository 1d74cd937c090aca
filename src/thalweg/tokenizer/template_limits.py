"""The bounds on one render of a chat template.

Whatever can make a long text or list out of short ones is measured before it is made, and charged to a
budget. Every loop pass, call and filter is a step, at which the clock is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.utils import Namespace

MAX_CHARS = 8_000_000  # of any one text, and so of the output
MAX_ITEMS = 1_000_000  # of any one list, and of a value that is written out
MAX_WORK = 500_000_000  # characters and items made in one render
MAX_STEPS = 1_000_000  # loop passes, calls and filters of one render
MAX_SECONDS = 5.0


class LimitError(jinja2.TemplateError):
    """A render went over one of the bounds above."""


class RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


@dataclass(slots=True)
class _Budget:
    steps: int
    work: float
    deadline: float


_budget: ContextVar[_Budget | None] = ContextVar("template_budget", default=None)


@contextmanager
def limits() -> Iterator[None]:
    """Give this thread or task the budget of one render."""
    token = _budget.set(_Budget(MAX_STEPS, MAX_WORK, time.monotonic() + MAX_SECONDS))
    try:
        yield
    finally:
        _budget.reset(token)


def count_step() -> None:
    """Count a loop pass or a call. Raises LimitError when the steps or the time are used up."""
    budget = _budget.get()
    if budget is None:
        raise LimitError("it runs outside of limits()")
    budget.steps -= 1
    if budget.steps < 0:
        raise LimitError(f"it takes more than {MAX_STEPS} steps")
    if time.monotonic() > budget.deadline:
        raise LimitError(f"it takes more than {MAX_SECONDS:g} seconds")


def allow(size: float, limit: int, what: str) -> None:
    """Raise LimitError when something of `size` is too large, by itself or with all that came before it."""
    if size > limit:
        raise LimitError(f"it makes more than {limit} {what}")
    budget = _budget.get()  # None while Jinja folds constants
    if budget is not None:
        budget.work -= max(size, 0)
        if budget.work < 0:
            raise LimitError(f"it makes more than {MAX_WORK} characters and items in all")


def allow_chars(size: float) -> None:
    allow(size, MAX_CHARS, "characters in a text")


_CONTAINERS: tuple[type[Collection[Any]], ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    type({}.items()),
    type({}.keys()),
    type({}.values()),
)


@dataclass(slots=True)
class Extent:
    """What a value stands for when it is written out or compared; parts it shares count as often as they occur."""

    items: int = 0
    chars: int = 0
    depth: int = 0


def extent(value: Any) -> Extent:
    """Measure a value and charge it. A few lists inside each other can stand for more than memory holds.

    Raises LimitError for more than MAX_ITEMS items or MAX_CHARS characters.
    """
    found = Extent()
    todo = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, str):
            found.chars += len(item)
        elif isinstance(item, dict):
            todo.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, _CONTAINERS):
            todo.extend((part, depth + 1) for part in item)
        elif isinstance(item, Namespace):
            raise LimitError("it writes out a namespace")
        elif isinstance(item, int):
            found.chars += item.bit_length() // 3
        found.items += 1
        found.depth = max(found.depth, depth)
        if found.items + len(todo) > MAX_ITEMS or found.chars > MAX_CHARS:
            raise LimitError(f"it needs the whole of a value of more than {MAX_ITEMS} items or {MAX_CHARS} characters")
    allow(found.items + found.chars, MAX_CHARS + MAX_ITEMS, "items")
    return found


def comparable(value: Any) -> Any:
    """The value, once it is known to be small enough to be compared or hashed: Python does so part by part."""
    if isinstance(value, _CONTAINERS):
        extent(value)
    return value


def sliceable(value: Any) -> Any:
    """The value, once a copy of it is charged."""
    if isinstance(value, Sized):
        allow(len(value), MAX_CHARS if isinstance(value, str) else MAX_ITEMS, "items")
    return value


def text_of(value: Any) -> str:
    """str(value), measured first."""
    if isinstance(value, str):
        return value
    if isinstance(value, (Namespace, *_CONTAINERS)):
        extent(value)
    return str(value)


def concat(pieces: Iterable[Any], separator: str = "") -> str:
    """The texts of `pieces` with `separator` between them."""
    texts: list[str] = []
    chars = 0
    for piece in pieces:
        texts.append(text_of(piece))
        chars += len(texts[-1]) + len(separator)
        if chars > MAX_CHARS:
            break
    allow_chars(chars)
    return str(separator).join(texts)


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, each of them a step."""
    for value in values:
        count_step()
        yield value


def to_list(value: Iterable[Any]) -> list[Any]:
    if isinstance(value, Sized):
        allow(len(value), MAX_ITEMS, "items in a list")
        return list(value)
    return list(counted(value))
