"""The suite "ranks": ops that ranks run together, on the ranks of an engine with few layers, beside what the link
between them allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace

from thalweg.bench.ceilings import Ceilings
from thalweg.bench.kernels.measure import Measurement
from thalweg.bench.kernels.model import ModelOps
from thalweg.bench.spread import Spread
from thalweg.config.engine import EngineConfig
from thalweg.engine.start import Engine
from thalweg.errors import ConfigError
from thalweg.ops.registry import Choice, implementations
from thalweg.quant.dtypes import DTYPE_BYTES
from thalweg.recorder.orders import MeasureExchange

OPS = ("all_reduce_add", "linear_reduce_add", "all_gather", "embedding")
OF_EXPERTS = ("expert_dispatch", "expert_combine")
"""Of as many data-parallel ranks that divide the experts, if the model has experts: measured on the same ranks."""


def choose_ranks(op: str | None, ranks: int) -> list[str]:
    """The ops of the suite, or one. Raises ConfigError for a name that it has not, or for one rank."""
    if op is not None and op not in (*OPS, *OF_EXPERTS):
        raise ConfigError(f"--op is {op!r}; suite 'ranks' has {', '.join((*OPS, *OF_EXPERTS))}")
    if ranks == 1:
        raise ConfigError("--suite ranks measures what several ranks run together; set --tensor-parallel-size")
    return [op] if op is not None else [*OPS, *OF_EXPERTS]


def measure_ranks(
    names: list[str], config: EngineConfig, ceilings: Ceilings, batch_sizes: tuple[int, ...]
) -> Iterator[Measurement]:
    """A Measurement of each implementation of these ops, by op, dims and rows."""
    choices = [*ModelOps(config).choices, *_of_experts(config)]
    # One layer is enough to have ranks, and leaves them memory for what they measure.
    small = replace(config, num_layers=1, max_num_seqs=1, max_model_len=64, cache_memory=1 << 26)
    with closing(Engine(small)) as engine:
        link = ceilings.with_link(engine).link_bytes_per_s
        for choice in (choice for name in names for choice in choices if choice.op == name):
            for rows in batch_sizes:
                yield from _measure(engine, choice, rows, config, link)


def _of_experts(config: EngineConfig) -> list[Choice]:
    """Those of OF_EXPERTS; none for a model whose experts so many ranks do not divide."""
    data = replace(
        config, tensor_parallel_size=1, data_parallel_size=config.tensor_parallel_size, enable_expert_parallel=True
    )
    try:
        return [choice for choice in ModelOps(data).choices if choice.op in OF_EXPERTS]
    except ConfigError:
        return []


def _measure(engine: Engine, choice: Choice, rows: int, config: EngineConfig, link: float) -> Iterator[Measurement]:
    sizes: dict[str, int] = {name: n for name, n in asdict(choice.dims).items() if name not in ("ranks", "mapped")}
    sent = _sent(choice.op, sizes, rows, config)
    serving = next(span.name for span in choice.table if rows in span.tokens)
    first_us: float | None = None
    for i in sorted(implementations(choice.op), key=lambda i: (i.name != "reference", i.priority)):
        result = Measurement(
            choice.op,
            f"{' '.join(f'{name}={n}' for name, n in sizes.items())}, batch {rows}",
            i.name,
            "eager" if engine.info.device == "cpu" else "graph",
            i.name == serving,
            num_bytes=sent,
            bound="bytes",
            floor_us=1e6 * sent / link,
        )
        found = engine.order(MeasureExchange(choice.op, i.name, sizes, rows, config.dtype)).result()
        if isinstance(found, str):
            yield replace(result, refusal=found)
            continue
        us = Spread.of(found)
        first_us = first_us or us.median
        yield replace(result, us=us, times_faster=first_us / us.median)


def _sent(op: str, sizes: dict[str, int], rows: int, config: EngineConfig) -> float:
    """Bytes that a rank sends at the least."""
    ranks = config.tensor_parallel_size
    if op == "all_gather":
        return rows * sizes["row_bytes"] * (ranks - 1)
    row = sizes.get("O", sizes["D"]) * DTYPE_BYTES[config.dtype]
    if op in OF_EXPERTS:  # an expert's number and weight are 8 bytes
        return rows * (row + 8 * sizes.get("K", 0)) * (ranks - 1)
    if op == "embedding":
        return rows * row * (ranks - 1) / ranks
    return 2 * rows * row * (ranks - 1) / ranks
