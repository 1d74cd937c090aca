"""The bounds on one render of a chat template, and the filters that keep to them.

Whatever can make a long text or list out of short ones is measured before it is made, and charged to a
budget.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.utils import Namespace

MAX_CHARS = 8_000_000  # of any one text, and so of the output
MAX_ITEMS = 1_000_000  # of any one list, and of a value that is written out
MAX_WORK = 500_000_000  # characters and items made in one render
MAX_STEPS = 1_000_000  # loop passes and calls of one render
MAX_SECONDS = 5.0
MAX_MARGIN = 16  # columns of one indentation


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
        budget.work -= size
        if budget.work < 0:
            raise LimitError(f"it makes more than {MAX_WORK} characters and items in all")


def allow_chars(size: float) -> None:
    allow(size, MAX_CHARS, "characters in a text")


_CONTAINERS: tuple[type[Collection[Any]], ...] = (
    list,
    tuple,
    set,
    frozenset,
    type({}.items()),
    type({}.keys()),
    type({}.values()),
)


def text_of(value: Any) -> str:
    """str(value), measured first: a few lists inside each other can stand for more text than memory holds."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (dict, Namespace, *_CONTAINERS)):
        return str(value)
    items = chars = 0
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            chars += len(item)
        elif isinstance(item, dict):
            todo.extend(item.keys())
            todo.extend(item.values())
        elif isinstance(item, _CONTAINERS):
            todo.extend(item)
        elif isinstance(item, Namespace):
            raise LimitError("it writes out a namespace")
        items += 1
        if items + len(todo) > MAX_ITEMS or chars > MAX_CHARS:
            raise LimitError(f"it writes out a value of more than {MAX_ITEMS} items or {MAX_CHARS} characters")
    allow(items + chars, MAX_CHARS + MAX_ITEMS, "items")
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
    return separator.join(texts)


def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = text_of(value), text_of(old), text_of(new)
    found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    allow_chars(len(text) + found * max(0, len(new) - len(old)))
    return text.replace(old, new, found)


@jinja2.pass_environment
def join(environment: jinja2.Environment, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = [environment.getitem(item, attribute) for item in value]
    return concat(value, text_of(d))


def indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, margin = text_of(value), _margin(width)
    allow_chars(len(text) + len(margin) * (text.count("\n") + 1))
    return "\n".join(
        margin + line if (first or i) and (blank or line) else line for i, line in enumerate(text.split("\n"))
    )


def _margin(width: int | str | None) -> str:
    if isinstance(width, int):
        width = " " * min(width, MAX_MARGIN + 1)
    if len(width or "") > MAX_MARGIN:
        raise LimitError(f"it indents by more than {MAX_MARGIN} columns")
    return width or ""


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: no HTML escapes, and characters as they are."""
    for margin in (indent, *(separators or ())):
        _margin(margin)
    text_of(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key and value pairs of an object, or of its JSON: tool call arguments come as either."""
    if isinstance(value, str):
        value = json.loads(value)
    return [] if isinstance(value, jinja2.Undefined) else value.items()


def to_list(value: Any) -> list[Any]:
    if isinstance(value, Sized):
        allow(len(value), MAX_ITEMS, "items")
    return list(value)


def trim(value: Any, chars: str | None = None) -> str:
    return text_of(value).strip(chars)


def on_text(apply: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A filter of one text that measures a value which is not one."""
    return lambda value: apply(text_of(value))


def raise_exception(message: Any) -> NoReturn:
    raise RefusedError(text_of(message))


def strftime_now(format: str) -> str:
    # The C library honours widths: "%1000000000d" would be a text of that length.
    if len(format) > 256 or re.search(r"%(?!-?[A-Za-z%])", format):
        raise LimitError(f"it asks for the date as {format[:40]!r}")
    return datetime.now().strftime(format)
