"""Jinja's filters, tests and globals, held to the bounds of a render, and what chat templates have besides."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from types import GeneratorType
from typing import Any, NoReturn

import jinja2
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.filters import FILTERS as DEFAULT_FILTERS
from jinja2.tests import TESTS
from jinja2.utils import generate_lorem_ipsum
from markupsafe import Markup

from thalweg.tokenizer import template_limits as limits
from thalweg.tokenizer.messages import NoContent
from thalweg.tokenizer.template_limits import LimitError, RefusedError, allow_chars, extent, text_of
from thalweg.tokenizer.template_text import percent, replaced

MAX_MARGIN = 1000  # columns of one indentation
MAX_SLOW_CHARS = 100_000  # of what is wrapped, stripped of tags, searched for links or laid out
MAX_DIGITS = 1000  # of a number that is not decimal
MAX_PATH_CHARS = 1000  # of an attribute's dotted name
MAX_PRECISION = 300
MAX_LOREM_WORDS = 10_000

Function = Callable[..., Any]

# By what they do with their first argument. Those in none of the lists look at it, or take a part of it.
_WRITES_OUT = (
    "capitalize e escape forceescape lower title trim upper urlencode wordcount xmlattr truncate filesizeformat"
)
_SLOW = "pprint striptags urlize wordwrap"
_COMPARES = {"dictsort": None, "groupby": 1, "max": 2, "min": 2, "sort": 3, "unique": 2}  # where the attribute stands
_TAKES_ATTRIBUTE = {"map": None, "rejectattr": 1, "selectattr": 1}


def filters() -> dict[str, Function]:
    """All of Jinja's filters by name. Each is a step, and so is each item of those that work lazily."""
    own = DEFAULT_FILTERS | {
        "batch": _batch,
        "center": lambda value, width=80: _padded(text_of(value), width),
        "format": _format,
        "indent": _indent,
        "int": _int,
        "items": _items,
        "join": _join,
        "list": limits.to_list,
        "replace": _replace,
        "round": _round,
        "safe": lambda value: Markup(text_of(value)),
        "slice": _slice,
        "string": text_of,
        "sum": _sum,
        "tojson": tojson,
    }
    prepared: dict[str, Function] = {}
    for name, function in own.items():
        if name in _WRITES_OUT.split():
            function = _on_first(extent, function)
        elif name in _SLOW.split():
            function = _on_first(_slow, function)
        elif name in _COMPARES:
            function = _on_first(_comparable_items, _with_path(function, _COMPARES[name]))
        elif name in _TAKES_ATTRIBUTE:
            function = _with_path(function, _TAKES_ATTRIBUTE[name])
        prepared[name] = _step(function)
    # What the sandbox puts around operands and slices; no step, since there are so many.
    return prepared | {"_comparable": limits.comparable, "_sliceable": limits.sliceable}


def tests() -> dict[str, Function]:
    """All of Jinja's tests by name."""
    own: dict[str, Any] = dict(TESTS)
    for name, function in TESTS.items():
        if function in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
            own[name] = _comparing(function)
    return own | {
        "in": _comparing(own["in"]),
        "none": lambda value: value is None or isinstance(value, NoContent),
        "lower": lambda value: text_of(value).islower(),
        "upper": lambda value: text_of(value).isupper(),
        "odd": lambda value: _no_text(value) % 2 == 1,
        "even": lambda value: _no_text(value) % 2 == 0,
        "divisibleby": lambda value, num: _no_text(value) % num == 0,
    }


def globals_() -> dict[str, Any]:
    """Jinja's global functions but for range, which its sandbox bounds, and the two of chat templates."""
    return DEFAULT_NAMESPACE | {
        "lipsum": _lipsum,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }


def _step(function: Function) -> Function:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        limits.count_step()
        for arg in args:
            if isinstance(arg, str):
                allow_chars(len(arg))
        result = function(*args, **kwargs)
        return limits.counted(result) if isinstance(result, GeneratorType) else result

    return counted


def _on_first(prepare: Callable[[Any], Any], function: Function) -> Function:
    """`function` after prepare(its first argument), whose result, if not an Extent, takes the argument's place."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        found = prepare(args[at])
        return function(*args[:at], args[at] if isinstance(found, limits.Extent) else found, *args[at + 1 :], **kwargs)

    return prepared


def _with_path(function: Function, position: int | None) -> Function:
    """`function` once its attribute's name is known to be of a sensible length: each part of it costs for each item."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        path = kwargs.get("attribute")
        if position is not None and len(args) > at + position:
            path = args[at + position]
        _check_path(path)
        return function(*args, **kwargs)

    return checked


def _check_path(path: Any) -> None:
    if isinstance(path, str) and len(path) > MAX_PATH_CHARS:
        raise LimitError(f"it names an attribute of more than {MAX_PATH_CHARS} characters")


def _comparable_items(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, Iterable) and not isinstance(value, Sized)):
        value = limits.to_list(value)
    return limits.comparable(limits.sliceable(value))


def _slow(value: Any) -> limits.Extent:
    found = extent(value)
    if found.chars + found.items * (1 + found.depth) > MAX_SLOW_CHARS:
        raise LimitError(f"it lays out more than {MAX_SLOW_CHARS} characters")
    return found


def _comparing(function: Function) -> Function:
    return lambda left, right: function(limits.comparable(left), limits.comparable(right))


def _no_text(value: Any) -> Any:
    if isinstance(value, str):
        raise TypeError("expected a number, and a text came")
    return value


def _count(value: Any) -> Any:
    if isinstance(value, int):
        limits.allow(value, limits.MAX_ITEMS, "items in a list")
    return value


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Any:
    return DEFAULT_FILTERS["batch"](value, _count(linecount), fill_with)


@jinja2.pass_eval_context
def _slice(eval_context: Any, value: Any, slices: int, fill_with: Any = None) -> Any:
    return DEFAULT_FILTERS["slice"](eval_context, limits.to_list(value), _count(slices), fill_with)


def _padded(text: str, width: int) -> str:
    allow_chars(max(len(text), width))
    return text.center(width)


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    if args and kwargs:
        raise TypeError("format takes values or names, not both")
    return percent(text_of(value), kwargs or args)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, margin = text_of(value), _margin(width)
    allow_chars(len(text) + len(margin) * (len(text.splitlines()) + 1))
    indented: str = DEFAULT_FILTERS["indent"](text, margin, first, blank)
    return indented


def _margin(width: int | str | None) -> str:
    if isinstance(width, int):
        width = " " * min(width, MAX_MARGIN + 1)
    if len(width or "") > MAX_MARGIN:
        raise LimitError(f"it indents by more than {MAX_MARGIN} columns")
    return width or ""


def _int(value: Any, default: Any = 0, base: int = 10) -> Any:
    # Python itself bounds decimal digits.
    if isinstance(value, str) and base != 10 and len(value) > MAX_DIGITS:
        raise LimitError(f"it makes a number of more than {MAX_DIGITS} digits")
    return DEFAULT_FILTERS["int"](value, default, base)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key and value pairs of an object, or of its JSON: tool call arguments come as either."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise TypeError(f"items of {value!r:.60}; expected an object, or the JSON of one") from None
    return [] if isinstance(value, jinja2.Undefined) else value.items()


@jinja2.pass_context
def _join(context: Any, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        _check_path(attribute)
        value = DEFAULT_FILTERS["map"](context, value, attribute=attribute)
    return limits.concat(value, text_of(d))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text_of(value)), str(text_of(old)), str(text_of(new))
    allow_chars(len(text) + replaced(text, old, new, count))
    return text.replace(old, new, -1 if count is None else count)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(value, (int, float)):
        return round(value)
    if isinstance(precision, int) and abs(precision) > MAX_PRECISION:
        raise LimitError(f"it rounds to more than {MAX_PRECISION} places")
    return DEFAULT_FILTERS["round"](value, precision, method)


@jinja2.pass_context
def _sum(context: Any, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    if attribute is not None:
        _check_path(attribute)
        value = DEFAULT_FILTERS["map"](context, value, attribute=attribute)
    for item in limits.counted(value):
        if isinstance(start, str):
            raise TypeError("sum adds no texts; '~' and join do")
        start = context.environment.call_binop(context, "+", start, item)
    return start


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: no HTML escapes, and characters as they are."""
    added = max(len(_margin(margin)) for margin in (indent, *(separators or ())))
    found = extent(value)
    allow_chars(found.chars + found.items * added * (1 + found.depth))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any) -> NoReturn:
    raise RefusedError(text_of(message))


def strftime_now(format: str) -> str:
    # The C library honours widths: "%1000000000d" would be a text of that length.
    if len(format) > 256 or re.search(r"%(?!-?[A-Za-z%])", format):
        raise LimitError(f"it asks for the date as {format[:40]!r}")
    return datetime.now().strftime(format)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    limits.allow(math.prod((n, max)), MAX_LOREM_WORDS, "words")
    return generate_lorem_ipsum(n, html, min, max)
