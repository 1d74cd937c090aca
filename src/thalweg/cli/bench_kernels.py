"""`thalweg bench kernels`: every op's implementations side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.bench import OutputJson, _facts, _integers
from thalweg.cli.results_file import check_writable, write_json
from thalweg.config.engine import EngineConfig, parse_size
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.bench.kernels.measure import Measurement


def kernels(
    suite: Annotated[
        str,
        typer.Option(
            help="decode, prefill, ranks (what several ranks run together), or seeds: the published results this"
            " project grew from."
        ),
    ] = "decode",
    op: Annotated[str | None, typer.Option(metavar="NAME", help="Measure only this op of the suite.")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Sequences. Default: 1,8,32,128 (CPU: 1,8); prefill: 1."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Cached tokens of a sequence; in prefill its new tokens, in seeds those of a prefill."
            " Default: 4k (CPU: 512).",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16.")] = (
        "auto"
    ),
    config_file: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Take the sizes of this config.json's layers. Default: Kimi-Linear-48B's (CPU: the bundled model's).",
        ),
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Take the sizes of the first N layers only.")
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option("--tensor-parallel-size", "-tp", metavar="N", help="One rank's share of the layers."),
    ] = 1,
    output_json: OutputJson = None,
) -> None:
    """Microseconds of every implementation of an op, at the sizes that a model's layers ask for, beside the machine's
    floor; > marks those that the model runs.

    Each is checked against the first of its case, and not timed if it is wrong. On a GPU decode runs in CUDA graphs
    over arguments that the cache does not hold. Medians, with least and greatest in brackets.
    """
    sizes = None if batch_size is None else _integers(batch_size, "--batch-size")
    tokens = None if context is None else parse_size(context, "--context")
    for option, given, least in (("--batch-size", batch_size, min(sizes or [1])), ("--context", context, tokens)):
        if least is not None and least < 1:
            raise ConfigError(f"{option} is {given!r}; expected 1 or more")
    config = EngineConfig(  # refuses unknown names
        device=device,
        dtype=dtype,
        config_file=config_file,
        num_layers=num_layers,
        tensor_parallel_size=tensor_parallel_size,
        load_format="dummy",
    )
    check_writable(output_json)
    import torch

    from thalweg.assembly.model import choose_device
    from thalweg.bench.ceilings import measure_ceilings
    from thalweg.bench.kernels.case import Setting
    from thalweg.bench.kernels.model import PUBLISHED, ModelOps
    from thalweg.bench.kernels.ranks import choose_ranks, measure_ranks
    from thalweg.bench.kernels.suites import RANKS, choose_ops, run_suite
    from thalweg.bench.machine import describe_machine

    where = choose_device(config, 0)
    on_gpu = where.type == "cuda"
    if sizes is None:
        sizes = [1] if suite == "prefill" else [1, 8, 32, 128] if on_gpu else [1, 8]
    name = dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"
    config = replace(config, dtype=name, config_file=config_file or (str(PUBLISHED) if on_gpu else None))
    model = ModelOps(config)
    setting = Setting(where, getattr(torch, name), model, tuple(sizes), tokens or (4096 if on_gpu else 512))
    together = choose_ranks(op, tensor_parallel_size) if suite == RANKS else []
    builders = [] if together else choose_ops(suite, op, model)
    ceilings = measure_ceilings(where, setting.dtype)
    if on_gpu:
        torch.cuda.empty_cache()
    machine = describe_machine() | {
        "copy_GB_per_s": round(ceilings.bytes_per_s / 1e9),
        "matrix_TFLOP_per_s": round(ceilings.flops_per_s / 1e12, 1),
    }
    measured = {
        "suite": suite,
        "model": model.name,
        "tensor_parallel_size": tensor_parallel_size,
        "device": str(where),
        "dtype": name,
        "context": setting.context,
    }
    of_ranks = measure_ranks(together, config, ceilings, setting.batch_sizes)
    results = _print(of_ranks if together else run_suite(builders, setting, ceilings), measured | machine)
    write_json(output_json, {"engine": measured, "machine": machine, "results": [r.to_dict() for r in results]})


def _print(results: Iterator[Measurement], measured_on: dict[str, Any]) -> list[Measurement]:
    """A table for each op, as soon as its cases are done. Returns them all."""
    from rich.markup import escape

    from thalweg.cli.console import plain_table, stdout_console

    console, seen = stdout_console(), []
    console.print(_facts(measured_on), markup=False)
    for op, group in groupby(results, lambda r: r.op):
        rows = list(group)
        seen += rows
        headings = ("us per call", "faster", "reached", "floor us", "of floor", "error", "equal bits")
        table = plain_table("", *headings, numbers=True)
        table.columns[0].justify = "left"
        for case in dict.fromkeys(r.case for r in rows):
            table.add_row(escape(f"{op}, {case}"))
            for r in rows:
                if r.case == case and not r.refusal:
                    table.add_row(*map(escape, _cells(r)))
        console.print(table)
        for name, refusal in dict.fromkeys((r.implementation, r.refusal) for r in rows if r.refusal):
            console.print(f"  {name}: {refusal}", markup=False)
        for published in dict.fromkeys(r.published for r in rows if r.published):
            console.print(f"  published, on another machine: {published}", markup=False)
        console.print()
    return seen


def _cells(r: Measurement) -> list[str]:
    if r.us is None:
        return [f"  {r.implementation}: wrong: {r.wrong}"]
    return [
        f"{'>' if r.serves else ' '} {r.implementation} ({r.timed})",
        r.us.show(2),
        f"{r.times_faster:.2f}x",
        "-" if r.bound is None else _rate(r, r.us.median),
        "-" if r.floor_us is None else f"{r.floor_us:.2f}",
        "-" if r.floor_us is None else f"{r.floor_us / r.us.median:.2f}",
        "-" if r.error is None else f"{r.error:.1g}",
        "-" if r.equal_bits is None else "yes" if r.equal_bits else "no",
    ]


def _rate(r: Measurement, us: float) -> str:
    """In the unit of what sets the floor."""
    return f"{r.num_bytes / us / 1e3:.0f} GB/s" if r.bound == "bytes" else f"{r.flops / us / 1e6:.2f} TFLOP/s"
