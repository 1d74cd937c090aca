"""Results files as one Markdown table: a row for each size that was measured, a column for each figure of each file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thalweg.bench.accuracy import Accuracy
from thalweg.bench.compare import Key, Value
from thalweg.bench.spread import Spread
from thalweg.errors import ConfigError

Rows = Mapping[Key, Mapping[str, Value]]


def results_table(files: Sequence[tuple[str, Rows]], figures: Sequence[str] = ()) -> str:
    """The table of one or two files, given by label and rows; of spreads it has the medians.

    `figures` are the columns, in that order; all of the files' if empty. A figure that both files have is followed by
    the second over the first. "-" stands where a file has no such row or figure. Raises ConfigError for a figure that
    no file has.
    """
    there = list(dict.fromkeys(name for _, rows in files for row in rows.values() for name in row))
    for name in figures:
        if name not in there:
            raise ConfigError(f"--figure is {name!r}; expected one that the files have: {', '.join(there)}")
    keys = list(dict.fromkeys(key for _, rows in files for key in rows))
    sizes = list(dict.fromkeys(name for key in keys for name, _ in key))
    columns: list[tuple[str, list[str]]] = [
        (size.replace("_", " "), [_size(dict(key).get(size)) for key in keys]) for size in sizes
    ]
    for name in figures or there:
        values = [[rows.get(key, {}).get(name) for key in keys] for _, rows in files]
        for (label, _), column in zip(files, values, strict=True):
            if any(value is not None for value in column):
                heading = f"{_heading(name)}, {label}" if len(files) > 1 else _heading(name)
                columns.append((heading, [_show(value) for value in column]))
        if len(values) == 2 and all(any(value is not None for value in column) for column in values):
            ratios = [_ratio(a, b) for a, b in zip(*values, strict=True)]
            columns.append((f"{files[1][0]} / {files[0][0]}", ratios))
    lines = [[heading for heading, _ in columns], ["---"] * len(columns)]
    lines += [[cells[row] for _, cells in columns] for row in range(len(keys))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _heading(name: str) -> str:
    """`floor.step_ms` as "floor step ms"."""
    return name.replace(".", " ").replace("_", " ")


def _size(value: int | str | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def _ratio(a: Value | None, b: Value | None) -> str:
    if a is None or b is None or not _middle(a):
        return "-"
    return f"{_middle(b) / _middle(a):.2f}"


def _middle(value: Value) -> float:
    return value.median if isinstance(value, Spread) else value.share if isinstance(value, Accuracy) else value


def _show(value: Value | None) -> str:
    """Three digits, which is what figures of one machine are good for, or the integer."""
    if value is None:
        return "-"
    middle = _middle(value)
    return f"{middle:,.0f}" if abs(middle) >= 100 or middle == int(middle) else f"{middle:#.3g}"
