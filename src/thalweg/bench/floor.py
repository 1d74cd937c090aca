"""What a batch's figures are held against: bytes and operations counted from the config, over what the machine does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from thalweg.assembly.info import EngineInfo
from thalweg.assembly.source import ModelSource
from thalweg.bench.ceilings import Ceilings
from thalweg.models.family import step_costs
from thalweg.models.parts.part import Cost, Step
from thalweg.parallel.shards import Shards
from thalweg.quant import QUANTIZATIONS, scheme_named
from thalweg.quant.dtypes import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class StepFloor:
    """What one rank moves in its memory, computes and sends to other ranks at the least in a step, and the time of
    that: the sum over operations of the longest of the three."""

    bytes: float
    flops: float
    sent: float
    ms: float

    @classmethod
    def of(cls, costs: Sequence[Cost], ceilings: Ceilings) -> StepFloor:
        bytes_, flops, sent = (sum(getattr(c, name) for c in costs) for name in ("bytes", "flops", "sent"))
        return cls(bytes_, flops, sent, 1e3 * ceilings.floor_s(costs))


@dataclass(frozen=True, slots=True)
class Floor:
    """Of a decode step, and of all prompts as one step."""

    step: StepFloor
    prefill: StepFloor

    def to_dict(self) -> dict[str, float]:
        """step_bytes, prefill_ms and so on."""
        parts = {"step": asdict(self.step), "prefill": asdict(self.prefill)}
        return {f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()}


def batch_floor(
    source: ModelSource, info: EngineInfo, ceilings: Ceilings, batch_size: int, input_len: int, output_len: int
) -> Floor:
    """Of one rank that serves its share of `batch_size` requests, the larger one if shares differ: the step in the
    middle of the output, and all prompts."""
    step = costs_of(source, info, batch_size, cached=input_len + output_len // 2)
    prefill = costs_of(source, info, batch_size, new=input_len)
    return Floor(StepFloor.of(step, ceilings), StepFloor.of(prefill, ceilings))


def step_floor(source: ModelSource, info: EngineInfo, ceilings: Ceilings, rows: int, context: int) -> StepFloor:
    """Of one decode step of `rows` sequences with `context` cached tokens each, on one rank that has its share."""
    return StepFloor.of(costs_of(source, info, rows, cached=context), ceilings)


def costs_of(source: ModelSource, info: EngineInfo, sequences: int, *, new: int = 1, cached: int = 0) -> list[Cost]:
    """Every operation of a step on one rank of a built engine, in what it keeps weights, cache and states in. With
    data-parallel ranks, which have so many `sequences` between them, on one with the most of them."""
    config, scheme = source.config, info.quantization
    if source.gguf is not None and scheme not in (None, *QUANTIZATIONS):  # what is kept, which the file's tensors tell
        config, scheme = source.fitted(source.open_weights(), halves=True).config, None
    ranks = info.data_parallel_size
    share = -(-sequences // ranks)
    step = Step(
        share,
        new,
        cached,
        dtype_bytes=DTYPE_BYTES[info.dtype],
        state_bytes=DTYPE_BYTES[info.state_dtype],
        scheme=scheme_named(scheme),
        shards=Shards(0, info.tensor_parallel_size, 0, ranks),
        others=sequences - share,
    )
    return step_costs(config, step)
