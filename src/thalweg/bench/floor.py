"""What a batch's figures are held against: bytes and operations counted from the config, over what the machine does."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.bench.ceilings import Ceilings
from thalweg.build.info import EngineInfo
from thalweg.build.source import ModelSource


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
    c, widths = source.config, {"dtype_bytes": 4 if info.dtype == "float32" else 2, "quantization": info.quantization}
    step = source.package.decode_cost(c, batch_size, input_len + output_len // 2, **widths)
    prefill = source.package.prefill_cost(c, batch_size, input_len, **widths)
    times = [1e3 * ceilings.floor_s(cost.bytes, cost.flops) for cost in (step, prefill)]
    return Floor(step.bytes, step.flops, times[0], prefill.bytes, prefill.flops, times[1])
