"""`thalweg bench functions`: what each function and op costs in a fixed workload."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from thalweg.cli.results_file import check_writable, write_text
from thalweg.config.streams import say
from thalweg.errors import ConfigError

TOP = 12


def functions(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder of a small model. Default: the bundled model.")
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write the figures there, for thalweg bench compare. With --base: those of --head."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a smaller workload less often, to try the command out.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="Run this commit of --repository and --head in turn, and compare them."),
    ] = None,
    head: Annotated[str, typer.Option(metavar="COMMIT", help="With --base: the other commit.")] = "HEAD",
    repository: Annotated[str, typer.Option(metavar="FOLDER", help="With --base: the git repository.")] = ".",
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --base: write the comparison there as Markdown.")
    ] = None,
) -> None:
    """Calls, processor time and memory of every function and op, in a fixed workload on one thread.

    The model is imported, loaded, and made to prefill, decode, follow a grammar and answer over HTTP, several
    times in processes of their own. Memory is traced in runs of its own. It takes about a minute.
    """
    check_writable(save, "--save")
    check_writable(report, "--report")
    if base is None and report is not None:
        raise ConfigError("--report is given and --base is not; expected --base COMMIT, or --save FILE alone")
    from thalweg.bench.functions.record import record, this_version

    tell = partial(say, error=True)
    if base is None:
        (figures,) = record([this_version()], model, quick, tell)
        write_text(save, json.dumps(figures) + "\n", "--save")
        _print(figures)
        return
    from thalweg.bench.functions.commits import record_commits
    from thalweg.bench.functions.compare import compare
    from thalweg.bench.functions.report import markdown

    a, b = record_commits(Path(repository).expanduser(), base, head, model, quick, tell)
    text = markdown(compare(a, b), a["engine"]["version"], b["engine"]["version"])
    write_text(save, json.dumps(b) + "\n", "--save")
    write_text(report, text, "--report")
    print(text, end="")


def _print(figures: dict[str, Any]) -> None:
    from thalweg.bench.functions.compare import HOT
    from thalweg.bench.functions.report import energy, figures_table
    from thalweg.bench.spread import Spread

    facts = {**figures["engine"], **figures["machine"]}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, phase in figures["phases"].items():
        cpu, count = Spread.of(phase["cpu_ms"]).show(1), f"{phase['count']} {phase['unit']}"
        print(f"{name}: {count}{'s' if phase['count'] != 1 else ''}, CPU {cpu} ms, energy {energy(phase)}")
    for phase in HOT:
        for table in ("functions", "ops"):
            print(f"\n{figures_table(figures, phase, table, TOP)}")
