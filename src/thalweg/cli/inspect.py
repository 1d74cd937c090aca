"""`thalweg inspect`: what a model is and what it would cost here, from its config and headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli.options import engine_config, takes
from thalweg.config.engine import EngineConfig

if TYPE_CHECKING:
    from thalweg.assembly.inspect import Cost, Inspection


# No weight is drawn, so a shape alone needs no --load-format dummy.
@takes(config=partial(engine_config, load_format="dummy"))
def inspect(
    config: EngineConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's architecture, memory and ops. Needs config.json only; weight files are checked, not loaded."""
    from thalweg.assembly.inspect import describe

    found = describe(config)
    if as_json:
        import msgspec

        print(msgspec.json.encode(found).decode())
    else:
        _print(found)


def _print(found: Inspection) -> None:
    from thalweg.cli.console import plain_table, stdout_console

    console = stdout_console()
    facts = plain_table()
    cost, native = found.cost, found.checkpoint_cost
    for name, value in {
        "model": found.name,
        "architecture": found.architecture,
        "parameters": f"{found.parameters:,} ({found.parameters / 1e9:.2f} B)",
        "active per token": f"{found.active_parameters:,} ({found.active_parameters / 1e9:.2f} B)",
        "dtype, device": f"{_dtype(cost)} on {found.device}",
        "ranks": f"tensor parallel {found.tensor_parallel_size}, data parallel {found.data_parallel_size}",
        "vocabulary": f"{found.vocab_size:,}",
        "context": f"{found.context_len:,} tokens",
        "sampling": found.sampling_defaults,
        "layers": ", ".join(f"{count} x {kind}" for kind, count in found.layer_kinds.items()),
        **({} if found.experts is None else {"experts": found.experts}),
        "weight files": found.weight_files,
    }.items():
        facts.add_row(name, value)
    console.print(facts)

    console.print("\n[bold]Bytes[/], on each rank")
    table = plain_table("", *dict.fromkeys(f"in {_dtype(c)}" for c in (cost, native)))
    both = (cost,) if native == cost else (cost, native)
    table.add_row("weights", *(f"{c.weight_bytes}" for c in both))
    table.add_row("cache per token", *(f"{c.bytes_per_token}" for c in both))
    table.add_row("state per sequence", *(f"{c.bytes_per_sequence}" for c in both))
    console.print(table)

    console.print("\n[bold]Memory[/], on each rank")
    for line in [f"does not fit: {found.memory_error}"] if found.memory is None else found.memory.describe():
        console.print(line, markup=False)

    if found.memory is not None:
        console.print("\n[bold]Steps[/]")
        console.print(f"of decodes alone  {found.decode_steps}", markup=False)
        console.print(f"with prompts      {found.prefill_steps}", markup=False)

    console.print("\n[bold]Layers[/]")
    for first, last, layer in _runs(found.layers):
        console.print(f"{f'{first}-{last}' if last > first else first:>7}  {layer}", markup=False)

    console.print("\n[bold]Ops[/]")
    ops = plain_table("op", "dimensions", "tokens: served by", "not by")
    for op in found.ops:
        dims = " ".join(f"{name}={_size(size)}" for name, size in op.dims.items())
        refused = "; ".join(f"{name}: {reason}" for name, reason in op.refused) or "-"
        ops.add_row(op.op, dims, "\n".join(map(str, op.table)), refused)
    console.print(ops)


def _size(size: int | str | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int | str) else "+".join(map(str, size))


def _dtype(cost: Cost) -> str:
    return cost.dtype if cost.quantization is None else f"{cost.dtype}, experts in {cost.quantization}"


def _runs(layers: list[str]) -> Iterator[tuple[int, int, str]]:
    """(first, last, line) of each run of equal lines."""
    first = 0
    for line, run in groupby(layers):
        count = len(list(run))
        yield first, first + count - 1, line
        first += count
