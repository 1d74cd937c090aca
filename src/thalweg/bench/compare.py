"""Two results files of the same benchmark side by side: ratios, and what moved by more than its spread."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.bench.accuracy import Accuracy
from thalweg.bench.spread import Spread
from thalweg.config.bounded_json import parse_object
from thalweg.errors import CheckpointError, ConfigError

MAX_BYTES = 64 << 20
SIZES = ("batch_size", "input_len", "output_len", "context", "num_seqs", "num_finished")
KERNEL = ("op", "case", "implementation")
EVAL = ("eval", "num_questions", "num_shots", "max_new_tokens")
KEYS = (*SIZES, *KERNEL, *EVAL)  # what was measured
PARAMETERS = ("num_iters", "steps", "seed", "accuracy_error")  # how often, and what a figure itself holds
PARTS = ("median", "min", "max")
Key = tuple[tuple[str, int | str], ...]
Value = float | Spread | Accuracy


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one row in both files.

    `moved` is whether least..greatest do not overlap, or the accuracies differ by more than the standard error of
    their difference; None for a figure with neither. Of figures with a spread, all of them times, more is slower.
    """

    key: Key
    name: str
    a: Value
    b: Value

    @property
    def ratio(self) -> float | None:
        """B over A, of the medians; None where A is zero."""
        a, b = _middle(self.a), _middle(self.b)
        return b / a if a else None

    @property
    def moved(self) -> bool | None:
        if isinstance(self.a, Spread) and isinstance(self.b, Spread):
            return self.b.min > self.a.max or self.b.max < self.a.min
        if isinstance(self.a, Accuracy) and isinstance(self.b, Accuracy):
            return self.a.to(self.b).is_beyond_error
        return None

    def slower_by(self, percent: float) -> bool:
        """Whether a time grew by more than `percent` and beyond its spread."""
        is_time = isinstance(self.a, Spread)
        return is_time and bool(self.moved) and self.ratio is not None and self.ratio > 1 + percent / 100


@dataclass(frozen=True, slots=True)
class Comparison:
    """`differs` is what the files say of engine and machine that is not the same: name, A's, B's."""

    changes: list[Change]
    only_a: list[Key]
    only_b: list[Key]
    differs: list[tuple[str, str, str]]


def compare_files(a: str, b: str) -> Comparison:
    """Match the rows of two files that `thalweg bench` or `thalweg eval` wrote with --output-json by what they
    measured. Raises ConfigError."""
    first, second = read_results(a), read_results(b)
    rows_a, rows_b = rows_of(first, a), rows_of(second, b)
    both = [key for key in rows_a if key in rows_b]
    changes = [
        Change(key, name, value, rows_b[key][name])
        for key in both
        for name, value in rows_a[key].items()
        if name in rows_b[key] and _kind(value) is _kind(rows_b[key][name])
    ]
    if not changes:
        raise ConfigError(f"{a} and {b} have no row in common; expected the same benchmark of the same sizes")
    return Comparison(
        changes,
        [key for key in rows_a if key not in rows_b],
        [key for key in rows_b if key not in rows_a],
        list(_differences(first, second)),
    )


def read_results(path: str) -> dict[str, Any]:
    """The object in a results file. Raises ConfigError."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{path}: no such file; expected one that thalweg bench or eval --output-json wrote")
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(
                f"{path} is larger than {MAX_BYTES} bytes; expected a results file of thalweg bench or eval"
            )
        return parse_object(data, path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    except CheckpointError as e:
        raise ConfigError(str(e)) from None


def rows_of(file: Mapping[str, Any], path: str) -> dict[Key, dict[str, Value]]:
    """The figures of each row, by what was measured. Raises ConfigError for what is not a results file."""
    results = file.get("results")
    if not isinstance(results, list) or not results or not all(isinstance(r, dict) for r in results):
        raise ConfigError(f"{path} has no results; expected a file that thalweg bench or eval --output-json wrote")
    found: dict[Key, dict[str, Value]] = {}
    for row in results:
        key = tuple((name, row[name]) for name in KEYS if isinstance(row.get(name), int | str))
        if not key:
            raise ConfigError(f"{path} has a row that does not say what it measured; expected one of {', '.join(KEYS)}")
        if key in found:
            raise ConfigError(f"{path} has two rows of {show_key(key)}; expected one of each")
        found[key] = dict(_figures(row))
    return found


def show_key(key: Key) -> str:
    return ", ".join(f"{name} {value}" for name, value in key)


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """A row's figures: {"median", "min", "max"} or median_X, min_X, max_X as Spread X, the accuracy of an eval as
    Accuracy; other numbers as they are."""
    for name, value in row.items():
        if name in KEYS or name in PARAMETERS:
            continue
        if name == "accuracy" and (accuracy := Accuracy.read(row)) is not None:
            yield name, accuracy
            continue
        part, _, stem = name.partition("_")
        triple: list[Any] = [row.get(f"{p}_{stem}") for p in PARTS]
        if part in PARTS and all(_is_number(v) for v in triple):
            if part == "median":
                yield stem, Spread(*triple)
        elif isinstance(value, dict) and all(_is_number(value.get(p)) for p in PARTS):
            yield name, Spread(*(value[p] for p in PARTS))
        elif isinstance(value, dict):
            yield from ((f"{name}.{part}", v) for part, v in value.items() if _is_number(v))
        elif _is_number(value):
            yield name, value


def _middle(value: Value) -> float:
    if isinstance(value, Spread):
        return value.median
    return value.share if isinstance(value, Accuracy) else value


def _kind(value: Value) -> type:
    return type(value) if isinstance(value, Spread | Accuracy) else float


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and abs(value) < 1e300


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for part in ("engine", "machine"):
        one, other = a.get(part), b.get(part)
        if isinstance(one, dict) and isinstance(other, dict):
            for name in one | other:
                if one.get(name) != other.get(name):
                    yield name, str(one.get(name, "-")), str(other.get(name, "-"))
