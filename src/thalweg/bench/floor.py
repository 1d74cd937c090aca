"""What a batch's figures are held against: bytes and operations counted from the config, over what the machine does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thalweg.bench.ceilings import Ceilings
from thalweg.build.info import EngineInfo
from thalweg.build.source import ModelSource
from thalweg.cache.specs import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes moved and operations done at the least, of one decode step and of the prompts, and the times of that."""

    step_bytes: float
    step_flops: float
    step_ms: float
    prefill_bytes: float
    prefill_flops: float
    prefill_ms: float


def batch_floor(
    source: ModelSource, info: EngineInfo, ceilings: Ceilings, batch_size: int, input_len: int, output_len: int
) -> Floor:
    """Of `batch_size` requests: the step in the middle of the output, and all prompts as one step. One rank."""
    step = source.package.decode_cost(source.config, batch_size, input_len + output_len // 2, **_stored(info))
    prefill = source.package.prefill_cost(source.config, batch_size, input_len, **_stored(info))
    times = [1e3 * ceilings.floor_s(cost.bytes, cost.flops) for cost in (step, prefill)]
    return Floor(step.bytes, step.flops, times[0], prefill.bytes, prefill.flops, times[1])


def step_floor_ms(source: ModelSource, info: EngineInfo, ceilings: Ceilings, rows: int, context: int) -> float:
    """Milliseconds of one decode step of `rows` sequences with `context` cached tokens each, at the least. One rank."""
    cost = source.package.decode_cost(source.config, rows, context, **_stored(info))
    return 1e3 * ceilings.floor_s(cost.bytes, cost.flops)


def _stored(info: EngineInfo) -> dict[str, Any]:
    """What a built engine keeps its weights, pages and states in, as the cost functions of a family take it."""
    return {
        "dtype_bytes": DTYPE_BYTES[info.dtype],
        "state_bytes": DTYPE_BYTES[info.state_dtype],
        "quantization": info.quantization,
    }
