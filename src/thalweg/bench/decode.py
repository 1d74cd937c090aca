"""Decode steps by themselves: a cache that is full from the start, so that no prefill has to be waited for.

The cache holds random values. Steps follow one another as the engine runs them: the next is launched before the last
one's tokens are read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thalweg.bench.spread import Spread
from thalweg.core import Admission, SamplingParams, StepPlan, pack_ids
from thalweg.engine.start import Engine
from thalweg.errors import ConfigError
from thalweg.recorder.orders import FillCache

WARMUP_STEPS = 4


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Milliseconds per step of `batch_size` rows with `context` cached tokens each; `launches` on rank 0's device."""

    batch_size: int
    context: int
    step_ms: Spread
    launches: int | None


def measure_decode(
    engine: Engine, batch_size: int, context: int, steps: int, repeats: int, temperature: float
) -> DecodeStep:
    """`repeats` runs of `steps` steps after a warm-up. Raises ConfigError where the cache is too small for it."""
    info = engine.info
    last = context + WARMUP_STEPS + steps
    blocks_each = -(-(last + 1) // info.block_size)
    if info.num_blocks and batch_size * blocks_each > info.num_blocks:
        raise ConfigError(
            f"{batch_size} sequences of {last} tokens need {batch_size * blocks_each} blocks, and the cache has"
            f" {info.num_blocks}; lower --context or --batch-size, or raise --cache-memory"
        )
    if last > info.max_model_len:
        raise ConfigError(f"--context {context} and {steps} steps pass --max-model-len {info.max_model_len}")
    samples = []
    for _ in range(repeats):
        plans = _plans(batch_size, context, blocks_each, WARMUP_STEPS + steps, temperature)
        in_flight = deque([engine.submit(next(plans))])
        engine.order(FillCache()).result()  # after the admissions, which empty the slots
        for _ in range(WARMUP_STEPS - 1):
            in_flight.append(engine.submit(next(plans)))
        while in_flight:
            in_flight.popleft().result()
        began = time.perf_counter()
        for plan in plans:
            in_flight.append(engine.submit(plan))
            if len(in_flight) > 1:
                in_flight.popleft().result()
        while in_flight:
            in_flight.popleft().result()
        samples.append(1e3 * (time.perf_counter() - began) / steps)
    return DecodeStep(batch_size, context, Spread.of(samples), _launches(engine, batch_size, context, blocks_each))


def _plans(
    batch_size: int, context: int, blocks_each: int, count: int, temperature: float, admit: bool = True
) -> Iterator[StepPlan]:
    slots = list(range(1, batch_size + 1))
    params = SamplingParams(temperature=temperature, max_tokens=None, ignore_eos=True)
    for i in range(count):
        # The slots are taken without a prefill; their state is what FillCache left, their tokens are of no matter.
        first = i == 0 and admit
        yield StepPlan(
            step=i,
            admissions=[Admission(s, f"r{s}", pack_ids([0]), 1, params, s, False) for s in slots] if first else [],
            new_blocks=[(s, j, 1 + (s - 1) * blocks_each + j) for s in slots for j in range(blocks_each)]
            if first
            else [],
            decode_slots=slots,
            decode_starts=[context + i] * batch_size,
            prefills=[],
        )


def _launches(engine: Engine, batch_size: int, context: int, blocks_each: int) -> int | None:
    """Kernels and copies of one step on rank 0, as the profiler counts them on a CUDA device."""
    if engine.info.device == "cpu":
        return None
    import torch
    from torch.profiler import ProfilerActivity, profile

    (plan,) = _plans(batch_size, context, blocks_each, 1, 0.0, admit=False)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.submit(plan).result()
        torch.cuda.synchronize()
    events: Any = profiler.events()
    return sum(1 for e in events if str(e.device_type).endswith("CUDA"))
