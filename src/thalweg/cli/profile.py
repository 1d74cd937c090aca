"""`thalweg profile`: some steps of the engine as a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thalweg.cli.options import engine_config, takes
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError


@takes(config=engine_config, leave_out=("max_num_seqs", "generation_config"))
def profile(
    config: EngineConfig,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where the trace goes: .json or .json.gz.")
    ] = "trace.json.gz",
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Steps to record.")] = 8,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that run together.")] = 1,
    input_len: Annotated[int, typer.Option(metavar="TOKENS", min=1, help="Random tokens in each prompt.")] = 128,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Record from the prompts on. Default: once all requests decode.")
    ] = False,
) -> None:
    """Record steps of the engine with torch's profiler, after a warm-up, for Perfetto and `thalweg trace`.

    With -tp or -dp every rank is recorded, each as a process of the trace. Data-parallel ranks share the batch.
    """
    file = Path(output).expanduser()
    if not output.endswith((".json", ".json.gz")):
        raise ConfigError(f"--output is {output!r}; expected a file name that ends in .json or .json.gz")
    if not file.resolve().parent.is_dir():
        raise ConfigError(f"--output is {output!r}, whose folder does not exist; expected a file in an existing one")
    from thalweg.profiler.record import record_steps

    recorded = record_steps(config, file, steps=steps, batch_size=batch_size, input_len=input_len, prefill=prefill)
    info = recorded.info
    print(f"{info.name}, {info.dtype} on {info.device}; decode steps run as {info.decode_steps}")
    for (decodes, tokens), count in _runs(recorded.rows):
        parts = [f"{decodes} decode rows"] if decodes else []
        parts += [f"{tokens} prompt tokens"] if tokens else []
        print(f"{count} x step of {', '.join(parts)}")
    print(f"{output}: {file.stat().st_size / 1e6:.1f} MB")


def _runs(rows: list[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """Each kind of step in the order it first came, with how many there were."""
    counts: dict[tuple[int, int], int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return list(counts.items())
