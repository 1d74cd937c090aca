"""Methods and formats of texts, held to the bounds of a render: `%`, str.format, and what pads, joins or replaces."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.sandbox import SandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

from thalweg.tokenizer import template_limits as limits

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_CONVERSION = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?[#0\- +]*(?P<width>\*|\d*)(?:\.(?P<precision>\*|\d*))?[hlL]?(?P<kind>.)", re.DOTALL
)
_MAX_FLOAT_CHARS = 400
_ADDED_BY_JINJA = ("_loop_vars", "_block_vars")  # its compiler gives these to every call inside a loop or block


def percent(text: str, values: Any) -> Any:
    """`text % values`, its size known from the fields' widths and the values."""
    size = float(len(text))
    parts = values if isinstance(values, tuple) else (values,)
    largest = max((abs(part) for part in parts if isinstance(part, int)), default=0)
    for field in _CONVERSION.finditer(text):
        if field["kind"] == "(":
            raise ValueError("a field's name has parentheses; expected a plain name")
        for columns in (field["width"], field["precision"]):
            size += largest if columns == "*" else _number(columns)
        if isinstance(values, Mapping) and field["key"] is not None:
            size += _chars(values.get(field["key"]))
        if size > limits.MAX_CHARS:
            break
    limits.allow_chars(size + sum(map(_chars, parts)))
    return text % values


def _number(digits: str | None) -> int:
    return int(digits[:20]) if digits else 0


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    found = limits.extent(value)
    return found.chars + found.items * _MAX_FLOAT_CHARS if isinstance(value, float) else found.chars + 4 * found.items


class _Measured:
    """What a str.format makes, measured field by field."""

    chars = 0

    def convert_field(self, value: Any, conversion: Any) -> Any:
        limits.count_step()
        limits.comparable(value)
        return super().convert_field(value, conversion)  # type: ignore[misc]

    def format_field(self, value: Any, format_spec: str) -> Any:
        for digits in re.findall(r"\d+", format_spec):
            limits.allow_chars(_number(digits))
        field = super().format_field(value, format_spec)  # type: ignore[misc]
        self.chars += len(field)
        limits.allow_chars(self.chars)
        return field


class _Formatter(_Measured, SandboxedFormatter):
    pass


class _EscapeFormatter(_Measured, SandboxedEscapeFormatter):
    pass


def formatting(environment: SandboxedEnvironment, text: str, *, from_mapping: bool) -> Callable[..., str]:
    """str.format of `text`, or its format_map, by the environment's rules for attributes."""

    def apply(*args: Any, **kwargs: Any) -> str:
        limits.allow_chars(len(text))
        if from_mapping:
            if kwargs or len(args) != 1:
                raise TypeError("format_map() takes one mapping")
            (kwargs,) = args
            args = ()
        if isinstance(text, Markup):
            return Markup(_EscapeFormatter(environment, escape=text.escape).vformat(text, args, kwargs))
        return _Formatter(environment).vformat(text, args, kwargs)

    return apply


def measured_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Charge what text.name(*args, **kwargs) makes, and give the arguments to call it with."""
    kwargs = {key: value for key, value in kwargs.items() if key not in _ADDED_BY_JINJA}
    size: float = len(text)
    match name, args:
        case "center" | "ljust" | "rjust" | "zfill", (int(width), *_):
            size = max(size, width)
        case "expandtabs", _:
            columns = args[0] if args else kwargs.get("tabsize", 8)
            size += text.count("\t") * columns if isinstance(columns, int) else 0
        case "replace", (str(old), str(new), *rest):
            size += replaced(text, old, new, rest[0] if rest else kwargs.get("count"))
        case "translate", (dict(table),):
            size *= max((len(value) for value in table.values() if isinstance(value, str)), default=1)
        case "join", (pieces,):
            listed = limits.to_list(pieces)
            size = sum(len(piece) + len(text) for piece in listed if isinstance(piece, str))
            args = (listed,)
        case "split" | "rsplit", _:
            if len(text) > limits.MAX_ITEMS:
                separator = args[0] if args else kwargs.get("sep")
                pieces = str(text).split(separator, limits.MAX_ITEMS)
                limits.allow(len(pieces), limits.MAX_ITEMS, "items in a list")
    limits.allow_chars(size)
    return args, kwargs


def replaced(text: str, old: str, new: str, count: Any = None) -> int:
    """The characters that a replacement adds."""
    found = text.count(old)
    if isinstance(count, int) and count >= 0:
        found = min(found, count)
    return found * max(0, len(new) - len(old))
