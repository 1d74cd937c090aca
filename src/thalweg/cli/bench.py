"""`thalweg bench`: latency of a model, and what the engine itself costs."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.compare import compare
from thalweg.cli.options import engine_config, takes
from thalweg.cli.results_file import check_writable, write_json
from thalweg.config.engine import EngineConfig, parse_size
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.bench.decode import DecodeStep
    from thalweg.bench.floor import StepFloor
    from thalweg.bench.host import HostTime
    from thalweg.bench.latency import BatchLatency

bench = typer.Typer(help="Measure speed.")
bench.command()(compare)

_PREFIX_CACHE = ("enable_prefix_caching", "snapshot_interval", "snapshot_dtype", "cpu_cache_memory", "cache_folder",
                 "cache_folder_size")  # fmt: skip

Temperature = Annotated[
    float, typer.Option(metavar="T", help="Sampling temperature; 0 always takes the likeliest token.")
]
OutputJson = Annotated[str | None, typer.Option(metavar="FILE", help="Also write the figures to this file.")]


@bench.command()
@takes(config=engine_config, leave_out=("max_num_seqs", "generation_config"))
def latency(
    config: EngineConfig,
    batch_size: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Requests that start together. Several sizes run one after another."),
    ] = "1,8",
    input_len: Annotated[
        str, typer.Option(metavar="N,N,...", help="Random tokens in each prompt. Several lengths, one after another.")
    ] = "128",
    output_len: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens that each request generates.")] = 64,
    num_iters_warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Runs before those that count.")] = 1,
    num_iters: Annotated[int, typer.Option(metavar="N", min=1, help="Runs that count.")] = 5,
    temperature: Temperature = 1.0,
    output_json: OutputJson = None,
) -> None:
    """Time to first token, time per token after it and tokens/s of batches of random prompts, over the offline LLM.

    Figures are medians, with least and greatest in brackets. TPOT is (the time of the whole output - the time of one
    token) / (--output-len - 1). "floor" is what the machine's measured copy bandwidth and matrix rate allow, "host" a
    step's work outside the model and the sampler. With -dp a batch's requests are of all ranks, which have equal
    shares of them; the floor is that of one rank.
    """
    began = time.perf_counter()
    sizes, lengths = _integers(batch_size, "--batch-size"), _integers(input_len, "--input-len")
    from thalweg.bench.latency import check_context, check_lengths, measure_latency

    check_lengths(sizes, lengths, output_len)
    check_writable(output_json)
    from thalweg.assembly.source import open_source
    from thalweg.engine.llm import LLM

    results = []
    with LLM.of(replace(config, max_num_seqs=-(-max(sizes) // config.data_parallel_size))) as llm:
        info = llm.info
        start_s = time.perf_counter() - began
        check_context(lengths, output_len, info.max_model_len)
        import torch

        from thalweg.bench.ceilings import measure_ceilings
        from thalweg.bench.floor import batch_floor
        from thalweg.bench.machine import describe_machine
        from thalweg.bench.served import in_words, served_by

        source = open_source(config)
        on_gpu = info.device != "cpu"
        ceilings = measure_ceilings(torch.device("cuda" if on_gpu else "cpu"), getattr(torch, info.dtype))
        if on_gpu:
            torch.cuda.empty_cache()  # ranks in other processes may need it
        ceilings = ceilings.with_link(llm.engine)
        rng = random.Random(config.seed)
        for size, length in product(sizes, lengths):
            measured = measure_latency(
                llm,
                size,
                length,
                output_len,
                rng,
                num_iters_warmup=num_iters_warmup,
                num_iters=num_iters,
                temperature=temperature,
            )
            floor = batch_floor(source, info, ceilings, size, length, output_len)
            results.append(replace(measured, floor=floor))
    machine = describe_machine() | ceilings.describe()
    engine = {
        "model": info.name,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "state_dtype": info.state_dtype,
        "device": info.device,
        "tensor_parallel_size": info.tensor_parallel_size,
        "data_parallel_size": info.data_parallel_size,
        "load_format": config.load_format,
        "seed": config.seed,
        "temperature": temperature,
        "decode_steps": info.decode_steps.split(" of ")[0],
        "prefill_steps": info.prefill_steps.split(" of ")[0],
        "start_s": round(start_s, 1),
    }
    write_json(
        output_json,
        {
            "engine": engine,
            "start_seconds": info.start_seconds,
            "ops": (served := served_by(info.ops)),
            "machine": machine,
            "results": [r.to_dict() for r in results],
        },
    )
    _print_latency(results, {**engine, **machine}, info.start_seconds)
    print(f"\n{in_words(served)}")


@bench.command()
@takes(config=engine_config, leave_out=("max_num_seqs", "generation_config", *_PREFIX_CACHE))
def decode(
    config: EngineConfig,
    batch_size: Annotated[
        str, typer.Option(metavar="N,N,...", help="Sequences of a step. Several sizes run one after another.")
    ] = "1,8",
    context: Annotated[str, typer.Option(metavar="TOKENS", help="Cached tokens of each sequence.")] = "1024",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of a run.")] = 64,
    num_iters: Annotated[int, typer.Option(metavar="N", min=1, help="Runs that count.")] = 5,
    temperature: Temperature = 1.0,
    output_json: OutputJson = None,
) -> None:
    """Milliseconds a decode step takes on a cache filled with random values, beside the machine's floor.

    The floor is the step's bytes over the measured copy bandwidth, its arithmetic over the measured matrix rate, or
    what it sends over the measured rate between ranks, whichever is longest, on one rank.
    """
    sizes, length = _integers(batch_size, "--batch-size"), parse_size(context, "--context")
    check_writable(output_json)
    import torch

    from thalweg.assembly.model import choose_device
    from thalweg.assembly.source import open_source
    from thalweg.bench.ceilings import measure_ceilings
    from thalweg.bench.decode import WARMUP_STEPS, measure_decode
    from thalweg.bench.floor import step_floor
    from thalweg.bench.machine import describe_machine
    from thalweg.engine.start import Engine

    config = replace(config, max_num_seqs=max(sizes), enable_prefix_caching=False)  # all memory is for the sequences
    if config.max_model_len is None:
        config = replace(config, max_model_len=length + WARMUP_STEPS + steps + config.block_size)
    ceilings = measure_ceilings(choose_device(config, 0), torch.bfloat16)
    torch.cuda.empty_cache()
    source = open_source(config)
    with closing(Engine(config)) as engine:
        info = engine.info
        ceilings = ceilings.with_link(engine)
        results = [
            (
                measure_decode(engine, size, length, steps, num_iters, temperature),
                step_floor(source, info, ceilings, size, length),
            )
            for size in sizes
        ]
    machine = describe_machine() | ceilings.describe()
    facts = {
        "model": info.name,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "state_dtype": info.state_dtype,
        "tensor_parallel_size": info.tensor_parallel_size,
        "layers": len(info.layers),
        "start_s": round(info.load_seconds, 1),
    }
    figures = [
        asdict(step) | {f"floor_{name}": value for name, value in asdict(floor).items()} for step, floor in results
    ]
    write_json(output_json, {"engine": facts, "machine": machine, "results": figures})
    _print_decode(results, {**facts, **machine})


@bench.command()
def host(
    num_seqs: Annotated[int, typer.Option(metavar="N", min=1, max=4096, help="Requests that run at once.")] = 64,
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="Decode steps that count.")] = 500,
    finished: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Requests that have ended before. Several numbers run one after another."),
    ] = "0,10000",
    output_json: OutputJson = None,
) -> None:
    """Microseconds a decode step costs outside the model and the sampler, with a model that costs nothing.

    The cost must not grow with the number of requests that have ended.
    """
    counts = _integers(finished, "--finished")
    check_writable(output_json)
    from thalweg.bench.host import measure_host
    from thalweg.bench.machine import describe_machine
    from thalweg.config.model_source import model_folder
    from thalweg.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(model_folder(None))
    results = [measure_host(tokenizer, num_seqs, steps, count) for count in counts]
    machine = describe_machine()
    write_json(output_json, {"machine": machine, "results": [asdict(r) for r in results]})
    _print_host(results, machine)


def _print_latency(results: list[BatchLatency], measured_on: dict[str, Any], start_seconds: dict[str, float]) -> None:
    from thalweg.cli.console import plain_table, stdout_console

    console = stdout_console()
    console.print(_facts(measured_on), markup=False)
    console.print("start: " + ", ".join(f"{part} {s:.1f} s" for part, s in start_seconds.items()), markup=False)
    first = results[0]
    console.print(f"output {first.output_len} tokens, {first.num_iters} runs\n")
    headings = (
        "batch",
        "input\ntokens",
        "TTFT ms",
        "/floor",
        "TPOT ms",
        "floor ms",
        "/floor",
        "E2EL ms",
        "output\ntok/s",
    )
    table = plain_table(*headings, "launches\na step", "of the\nprompts", "host\nus/step", numbers=True)
    for r in results:
        tpot, floor = r.tpot_ms, r.floor
        table.add_row(
            str(r.batch_size),
            str(r.input_len),
            r.ttft_ms.show(2),
            "-" if floor is None else f"{r.ttft_ms.median / floor.prefill.ms:.2f}",
            "-" if tpot is None else tpot.show(3),
            "-" if floor is None else f"{floor.step.ms:.3f}",
            "-" if floor is None or tpot is None else f"{tpot.median / floor.step.ms:.2f}",
            r.e2el_ms.show(1),
            f"{r.output_throughput:.1f}",
            "-" if r.launches is None else f"{r.launches:.0f}",
            "-" if r.prompt_launches is None else str(r.prompt_launches),
            "-" if r.host_us_per_step is None else f"{r.host_us_per_step:.0f}",
        )
    console.print(table)
    rows = []
    for r in results:
        if (f := r.floor) is not None:
            for part, of in (("step", f.step), ("prompts", f.prefill)):
                rows.append(((str(r.batch_size), str(r.input_len), part), of))
    _print_floors(rows, ("batch", "input", "of"))


def _print_decode(results: list[tuple[DecodeStep, StepFloor]], measured_on: dict[str, Any]) -> None:
    from thalweg.cli.console import plain_table, stdout_console

    console = stdout_console()
    console.print(_facts(measured_on), markup=False)
    table = plain_table("batch", "context", "step ms", "floor ms", "step/floor", "tok/s", "launches", numbers=True)
    for step, floor in results:
        table.add_row(
            str(step.batch_size),
            str(step.context),
            step.step_ms.show(3),
            f"{floor.ms:.3f}",
            f"{step.step_ms.median / floor.ms:.2f}",
            f"{1e3 * step.batch_size / step.step_ms.median:.0f}",
            "-" if step.launches is None else str(step.launches),
        )
    console.print(table)
    _print_floors([((str(s.batch_size), str(s.context)), floor) for s, floor in results], ("batch", "context"))


def _print_floors(rows: Sequence[tuple[tuple[str, ...], StepFloor]], names: tuple[str, ...]) -> None:
    from thalweg.cli.console import plain_table, stdout_console

    console = stdout_console()
    console.print("\n[bold]Floor[/] of a rank: each weight, state and cache entry once, over the measured rates")
    table = plain_table(*names, "GB", "GFLOP", "MB sent", "ms", numbers=True)
    for cells, f in rows:
        amounts = (f"{f.bytes / 1e9:.3f}", f"{f.flops / 1e9:.3f}", f"{f.sent / 1e6:.3f}", f"{f.ms:.3f}")
        table.add_row(*cells, *amounts)
    console.print(table)


def _print_host(results: list[HostTime], measured_on: dict[str, Any]) -> None:
    from thalweg.cli.console import plain_table, stdout_console

    console = stdout_console()
    console.print(_facts(measured_on), markup=False)
    names = list(results[0].spans_us)
    table = plain_table("running", "finished\nbefore", "host\nus/step", *names, "(sampler)", numbers=True)
    for r in results:
        parts = [f"{r.spans_us[name]:.0f}" for name in names]
        table.add_row(str(r.num_seqs), str(r.num_finished), r.us_per_step.show(0), *parts, f"{r.sampler_us:.0f}")
    console.print(table)


def _facts(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _integers(text: str, option: str) -> list[int]:
    """ "1,8" -> [1, 8]. Raises ConfigError that names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ConfigError(f"{option} is {text!r}; expected integers with commas between them, e.g. 1,8")
    return [int(part) for part in parts]
