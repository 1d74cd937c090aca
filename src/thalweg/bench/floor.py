"""What a batch's figures are held against: bytes and operations counted from the config, over what the machine does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thalweg.bench.ceilings import Ceilings
from thalweg.build.info import EngineInfo
from thalweg.build.source import ModelSource
from thalweg.cache.specs import DTYPE_BYTES
from thalweg.models.family import step_costs
from thalweg.models.parts.part import Cost, Step
from thalweg.parallel.shards import Shards
from thalweg.quant import scheme_named


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes moved and operations done at the least, of one decode step and of the prompts, and the times of that: the
    sum over operations of the longer of the two."""

    step_bytes: float
    step_flops: float
    step_ms: float
    prefill_bytes: float
    prefill_flops: float
    prefill_ms: float


def batch_floor(
    source: ModelSource, info: EngineInfo, ceilings: Ceilings, batch_size: int, input_len: int, output_len: int
) -> Floor:
    """Of `batch_size` requests on one rank: the step in the middle of the output, and all prompts as one step."""
    step = costs_of(source, info, batch_size, cached=input_len + output_len // 2)
    prefill = costs_of(source, info, batch_size, new=input_len)
    return Floor(*_sums(step, ceilings), *_sums(prefill, ceilings))


def step_floor_ms(source: ModelSource, info: EngineInfo, ceilings: Ceilings, rows: int, context: int) -> float:
    """Milliseconds of one decode step of `rows` sequences with `context` cached tokens each, at the least. One rank."""
    return 1e3 * ceilings.floor_s(costs_of(source, info, rows, cached=context))


def costs_of(source: ModelSource, info: EngineInfo, sequences: int, *, new: int = 1, cached: int = 0) -> list[Cost]:
    """Every operation of a step on one rank of a built engine, in what it keeps weights, cache and states in."""
    step = Step(
        sequences,
        new,
        cached,
        dtype_bytes=DTYPE_BYTES[info.dtype],
        state_bytes=DTYPE_BYTES[info.state_dtype],
        scheme=scheme_named(info.quantization),
        shards=Shards(0, info.tensor_parallel_size),
    )
    return step_costs(source.config, step)


def _sums(costs: Sequence[Cost], ceilings: Ceilings) -> tuple[float, float, float]:
    return sum(c.bytes for c in costs), sum(c.flops for c in costs), 1e3 * ceilings.floor_s(costs)
