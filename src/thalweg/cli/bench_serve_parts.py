"""What `thalweg bench serve` reads out of its options, shows while it runs, and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.bench.serve_load import Outcome


@contextmanager
def progress(total: int) -> Iterator[Callable[[Outcome], object]]:
    """A bar on stderr: requests done, and how many of them failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task, failed = bar.add_task("", total=total, failed=""), 0

        def done(outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.error is not None
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")

        yield done


def read_percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= v <= 100 for v in values):
        raise ConfigError(f"--metric-percentiles is {text!r}; expected numbers from 0 to 100, e.g. 50,99,99.9")
    return values


def read_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body is {text!r}; expected a JSON object")
    return value


def write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{option}: {path} cannot be written: {e.strerror}") from None
    print(f"wrote {path}")
