"""`thalweg bench soak`: a server of our own under clients of every kind."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli.options import engine_config, takes
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.bench.soak import SoakResult
    from thalweg.bench.soak_clients import Clients


@takes(config=engine_config)
def soak(
    config: EngineConfig,
    minutes: Annotated[float, typer.Option(metavar="N", help="How long.")] = 1.0,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Clients at once.")] = 48,
    max_queued_requests: Annotated[int, typer.Option(metavar="N", min=0, help="The server's option.")] = 16,
    output_json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Start a server and send it short and long prompts, streamed and not, disconnects, bad requests, half requests,
    and SIGTERM in the end.

    Every answer must equal what the same request gave by itself; afterwards nothing may be held: no block, slot, task,
    file or socket; memory must not have grown. Exits with 1 and says so where that fails.
    """
    if not (math.isfinite(minutes) and minutes > 0):
        raise ConfigError(f"--minutes is {minutes}; expected a number above 0")
    if output_json is not None and not Path(output_json).expanduser().resolve().parent.is_dir():
        raise ConfigError(f"--output-json is {output_json!r}, in a folder that does not exist")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from thalweg.bench.soak import soak as run

    columns = (TextColumn("soak"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=60 * minutes, said="learning the answers")

        def tick(past: float, clients: Clients) -> None:
            said = f"{clients.counts.total()} requests, {len(clients.faults)} faults"
            bar.update(task, completed=past, said=said)

        result = asyncio.run(
            run(
                config,
                seconds=60 * minutes,
                concurrency=concurrency,
                max_queued=max_queued_requests,
                seed=config.seed,
                on_tick=tick,
            )
        )
    _print(result)
    if output_json is not None:
        Path(output_json).expanduser().write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    if result.faults:
        raise typer.Exit(1)


def _print(result: SoakResult) -> None:
    print(f"Duration (s): {result.seconds:.0f}")
    for name, count in result.counts.items():
        print(f"Requests, {name}: {count}" if "health" not in name else f"Slowest /{name}: {count}")
    print(f"Generated tokens: {result.generated_tokens}")
    print(f"Preemptions: {result.preemptions}")
    for name, m in result.memory.items():
        print(f"Memory of the {name} (MiB), early, late, most: {', '.join(f'{v / 2**20:.1f}' for v in m.values())}")
    for name, (before, after) in result.files.items():
        print(f"Open files of the {name}, before and after: {before}, {after}")
    print(f"Tasks of the server, before and after: {result.tasks[0]}, {result.tasks[1]}")
    print(f"From SIGTERM to the end (s): {result.drain_seconds:.2f}")
    print(f"Faults: {len(result.faults)}")
    for text in result.faults[:50]:
        print(f"fault: {text}")
