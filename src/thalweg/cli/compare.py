"""`thalweg bench compare`: two results files side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.bench.compare import Comparison, Value


def compare(
    a: Annotated[str, typer.Argument(metavar="A.json", help="Figures that --output-json wrote: the ones before.")],
    b: Annotated[str, typer.Argument(metavar="B.json", help="The ones after, of the same benchmark.")],
    fail_if_slower: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Exit with 1 if a time grew by more than this and beyond its spread."),
    ] = None,
) -> None:
    """Two results files side by side: B over A, and whether a figure moved beyond its spread.

    Moved means that least..greatest of the two do not overlap; figures without a spread are shown, not judged.
    """
    if fail_if_slower is not None and not (math.isfinite(fail_if_slower) and fail_if_slower >= 0):
        raise ConfigError(f"--fail-if-slower is {fail_if_slower}; expected a percentage of 0 or more")
    from thalweg.bench.compare import compare_files

    found = compare_files(a, b)
    _print(found, a, b)
    if fail_if_slower is not None and (slower := [c for c in found.changes if c.slower_by(fail_if_slower)]):
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
        words = {None: "-", False: "within the spread", True: "slower" if (c.ratio or 0) > 1 else "faster"}
        ratio = "-" if c.ratio is None else f"{c.ratio:.3f}"
        table.add_row(escape(c.name), _show(c.a), _show(c.b), ratio, words[c.moved])
    console.print(table)
    for path, keys in ((a, found.only_a), (b, found.only_b)):
        for missing in keys:
            console.print(f"only in {path}: {show_key(missing)}", markup=False)


def _show(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else value.show(3)
