"""`thalweg bench compare`: two results files side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.bench.accuracy import Accuracy
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.bench.accuracy import Difference
    from thalweg.bench.compare import Change, Comparison, Value


def compare(
    a: Annotated[str, typer.Argument(metavar="A.json", help="What bench or eval --output-json wrote: before.")],
    b: Annotated[str, typer.Argument(metavar="B.json", help="After: the same benchmark or eval.")],
    fail_if_slower: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Exit with 1 if a time grew by more than this and beyond its spread."),
    ] = None,
) -> None:
    """Two results files side by side: B over A, and whether a figure moved beyond its spread.

    Moved means that least..greatest of the two do not overlap; an accuracy moved if it changed by more than the
    standard error of the difference, of pairs if both files have the answers to the same questions. Other figures are
    shown, not judged. Of two files of bench functions: what was modified, added and removed, and what moved.
    """
    if fail_if_slower is not None and not (math.isfinite(fail_if_slower) and fail_if_slower >= 0):
        raise ConfigError(f"--fail-if-slower is {fail_if_slower}; expected a percentage of 0 or more")
    from thalweg.bench.compare import compare_files, read_results
    from thalweg.bench.functions.compare import is_functions

    files = read_results(a), read_results(b)
    if any(map(is_functions, files)):
        _compare_functions(files, (a, b), fail_if_slower)
        return
    found = compare_files(a, b)
    _print(found, a, b)
    if fail_if_slower is not None and (slower := [c for c in found.changes if c.slower_by(fail_if_slower)]):
        print(f"{len(slower)} times grew by more than {fail_if_slower:g} %")
        raise typer.Exit(1)


def _compare_functions(files: Sequence[Mapping[str, Any]], paths: Sequence[str], fail_if_slower: float | None) -> None:
    from thalweg.bench.functions import compare as functions
    from thalweg.bench.functions.report import markdown

    found = functions.compare(*files)
    print(markdown(found, *paths), end="")
    if fail_if_slower is not None and (slower := found.slower_by(fail_if_slower)):
        print(f"{len(slower)} times grew by more than {fail_if_slower:g} %")
        raise typer.Exit(1)


def _print(found: Comparison, a: str, b: str) -> None:
    from rich.markup import escape

    from thalweg.bench.compare import show_key
    from thalweg.cli.console import plain_table, stdout_console

    console = stdout_console()
    for name, one, other in found.differs:
        console.print(f"differs: {name}: {one} | {other}", markup=False)
    key = None
    table = plain_table("figure", "A", "B", "B/A", "moved")
    for c in found.changes:
        if c.key != key:
            key = c.key
            table.add_row(f"[bold]{escape(show_key(key))}[/]")
        ratio = "-" if c.ratio is None else f"{c.ratio:.3f}"
        table.add_row(escape(c.name), _show(c.a), _show(c.b), ratio, _verdict(c))
    console.print(table)
    for c in found.changes:
        if isinstance(c.a, Accuracy) and isinstance(c.b, Accuracy):
            console.print(f"{show_key(c.key)}: {_describe(c.a.to(c.b))}", markup=False)
    for path, keys in ((a, found.only_a), (b, found.only_b)):
        for missing in keys:
            console.print(f"only in {path}: {show_key(missing)}", markup=False)


def _verdict(change: Change) -> str:
    if change.moved is None:
        return "-"
    grew = (change.ratio or math.inf) > 1  # there is no ratio to nothing
    if isinstance(change.a, Accuracy):
        return ("better" if grew else "worse") if change.moved else "within its error"
    return ("slower" if grew else "faster") if change.moved else "within the spread"


def _describe(d: Difference) -> str:
    how = "" if d.p_value is None else f", paired: {d.only_a} right in A alone and {d.only_b} in B alone"
    chance = "" if d.p_value is None else f", McNemar's exact test p = {d.p_value:.3g}"
    return f"accuracy changed by {d.delta:+.4f}, standard error {d.error:.4f}{how}{chance}"


def _show(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else value.show(3)
