"""`thalweg trace`: what a recorded trace says, or the answer to a question in SQL."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from thalweg.profiler.sql import Answer
    from thalweg.profiler.summary import Summary


def trace(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A trace of `thalweg profile` or of torch's profiler.")],
    sql: Annotated[
        str | None,
        typer.Option(
            metavar="QUERY", help="Answer this instead: one SELECT in DuckDB over a table slice like Perfetto's."
        ),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Kernels and gaps to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a trace's kernels by total time, launches per step and per layer, idle gaps and host time by module, for
    each rank that it has.

    --sql has the table slice (id, parent_id, ts, dur, name, depth, track, category, correlation, args; times in ns) and
    the table functions ancestor_slice(id) and descendant_slice(id).
    """
    from thalweg.profiler.chrome import read_trace

    slices = read_trace(file)
    if sql is not None:
        from thalweg.profiler.sql import query

        _print_answer(query(slices, sql), as_json)
        return
    from thalweg.profiler.summary import by_rank, summarize

    ranks = {name: summarize(mine) for name, mine in by_rank(slices).items()}
    if len(ranks) < 2:
        ranks = {"": summarize(slices)}
    if as_json:
        found = {name: _as_dict(summary) for name, summary in ranks.items()}
        print(json.dumps(found.get("", {"ranks": found})))
        return
    for name, summary in ranks.items():
        if name:
            print(f"==== {name} ====")
        _print_summary(summary, top)


def _as_dict(found: Summary) -> dict[str, Any]:
    return asdict(found) | {"devices": [asdict(d) | {"share": d.share} for d in found.devices]}


def _print_answer(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"columns": answer.columns, "rows": answer.rows, "more": answer.more}, default=str))
    else:
        from rich.markup import escape

        from thalweg.cli.console import plain_table, stdout_console

        table = plain_table(*(escape(name) for name in answer.columns))
        for row in answer.rows:
            table.add_row(*("" if value is None else escape(str(value)) for value in row))
        stdout_console().print(table)
    if answer.more:
        print(f"only the first {len(answer.rows)} rows are shown; add a LIMIT or a WHERE", file=sys.stderr)


def _print_summary(found: Summary, top: int) -> None:
    from rich.markup import escape

    from thalweg.cli.console import plain_table, stdout_console

    console = stdout_console()
    steps = found.steps
    whole = sum(op.self_us for op in found.ops) or 1.0
    if found.launches is None:
        console.print("[bold]Torch ops[/] by self time; the trace has no device")
    else:
        console.print("[bold]Kernels and copies[/] by total time")
    table = plain_table("self us" if found.launches is None else "us", "share", "count", "us each", "name")
    for op in found.ops[:top]:
        each = op.self_us / op.count
        table.add_row(
            f"{op.self_us:.1f}", f"{op.self_us / whole:.1%}", str(op.count), f"{each:.2f}", escape(op.name[:100])
        )
    console.print(table)
    if len(found.ops) > top:
        console.print(f"and {len(found.ops) - top} more names (--top)", markup=False)

    def a_step(count: int) -> str:
        return f"{count} ({count / steps:.1f} a step)" if steps else str(count)

    console.print(f"\n[bold]Launches[/] in {steps} steps" if steps else "\n[bold]Launches[/]")
    facts = plain_table()
    if found.launches is not None and found.launch_calls is not None:
        facts.add_row("on the device", a_step(found.launches))
        facts.add_row("calls of the host for them", a_step(found.launch_calls))
    facts.add_row("torch ops", a_step(found.host_ops))
    console.print(facts)

    console.print("\n[bold]Host time by module[/]")
    if not found.modules:
        console.print("no module ran: CUDA graphs replay without them (record with --enforce-eager)", markup=False)
    else:
        table = plain_table("us", "self us", "calls", "us per call", "launches per call", "ops per call", "module")
        for m in found.modules:
            launches = "-" if m.launches is None else f"{m.launches / m.calls:.1f}"
            a_call = (f"{m.total_us / m.calls:.1f}", launches, f"{m.ops / m.calls:.1f}")
            table.add_row(f"{m.total_us:.1f}", f"{m.self_us:.1f}", str(m.calls), *a_call, escape(m.name))
        console.print(table)

    if found.spans:
        console.print("\n[bold]Host time by span[/]")
        table = plain_table("us", "count", "us each", "span")
        for s in found.spans[:top]:
            table.add_row(f"{s.total_us:.1f}", str(s.count), f"{s.total_us / s.count:.1f}", escape(s.name[:100]))
        console.print(table)

    for d in found.devices:
        console.print(
            f"\n[bold]Device {escape(d.device)}[/]: busy {d.busy_us:.1f} us, idle {d.idle_us:.1f} us ({d.share:.1%})"
            f" in {d.num_gaps} gaps, from its first work to its last"
        )
        table = plain_table("idle us", "at us", "after", "before")
        for gap in d.gaps[:top]:
            table.add_row(f"{gap.us:.1f}", f"{gap.at_us:.1f}", escape(gap.after[:60]), escape(gap.before[:60]))
        if d.gaps:
            console.print(table)
