"""`thalweg bench compare`: two results files side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.bench.accuracy import Accuracy
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.bench.accuracy import Difference
    from thalweg.bench.compare import Change, Comparison, Value


def compare(
    a: Annotated[str, typer.Argument(metavar="A.json", help="What bench or eval --output-json wrote: before.")],
    b: Annotated[
        str | None,
        typer.Argument(metavar="B.json", help="After: the same benchmark or eval. Only --markdown needs none."),
    ] = None,
    fail_if_slower: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Exit with 1 if a time grew by more than this and beyond its spread."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the medians as a Markdown table, of A alone or of both files.")
    ] = False,
    figure: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A column of that table, e.g. tpot_ms. May be repeated.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What that table calls A and B: give it twice. Default: the files' names."),
    ] = None,
) -> None:
    """Compare two results files: B over A, and whether a figure moved beyond its spread.

    Moved means that least..greatest of the two do not overlap; an accuracy moved if it changed by more than the
    standard error of the difference, of pairs if both files have the answers to the same questions. Other figures are
    shown, not judged. Of two files of bench functions: what was modified, added and removed, and what moved.
    """
    if markdown:
        if fail_if_slower is not None:
            raise ConfigError("--markdown prints figures and judges none; expected it without --fail-if-slower")
        _print_table([path for path in (a, b) if path is not None], figure or [], label or [])
        return
    if b is None or figure or label:
        raise ConfigError(
            "expected two results files to compare; --markdown prints one, and takes --figure and --label"
        )
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


def _print_table(paths: Sequence[str], figures: Sequence[str], labels: Sequence[str]) -> None:
    from thalweg.bench.compare import read_results, rows_of
    from thalweg.bench.results_table import results_table

    if labels and len(labels) != len(paths):
        raise ConfigError(f"--label is given {len(labels)} times for {len(paths)} files; expected one for each")
    names = labels or [Path(path).stem for path in paths]
    files = [(name, rows_of(read_results(path), path)) for name, path in zip(names, paths, strict=True)]
    print(results_table(files, figures), end="")


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
