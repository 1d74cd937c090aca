"""Host time of a step outside the model: scheduler, inputs, bookkeeping and text, around a model that costs nothing.

The real engine loop, runner, sampler and detokeniser run; the model's logits are made once and handed out again.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg import tracing
from thalweg.bench.spread import Spread
from thalweg.cache.manager import CacheManager
from thalweg.cache.storage import CacheStorage
from thalweg.core import Request, SamplingParams, StepPlan, StepResult
from thalweg.engine.core import EngineCore
from thalweg.layers.batch import Batch
from thalweg.ops.sample.reference import sample
from thalweg.parallel.mesh import Mesh
from thalweg.runner.slots import SlotTable
from thalweg.runner.step import ModelRunner
from thalweg.sampling.sampler import Sampler
from thalweg.sampling.table import SamplingTable
from thalweg.scheduler.scheduler import Scheduler
from thalweg.text.output import OutputProcessor
from thalweg.tokenizer.base import Tokenizer

PROMPT_LEN, BLOCK_SIZE = 16, 64
WARMUP_STEPS = 100  # the interpreter and the caches are cold at first
DEVICE_SPANS = ("model", "sample")  # what a device does, were there one


@dataclass(frozen=True, slots=True)
class HostTime:
    """Microseconds a decode step, with `num_seqs` requests running after `num_finished` others had ended.

    us_per_step is a whole step of the loop without the model and the sampler; spans_us are its parts that have a name
    (medians), sampler_us the sampler's on this CPU.
    """

    num_seqs: int
    num_finished: int
    steps: int
    us_per_step: Spread
    spans_us: dict[str, float]
    sampler_us: float


class _FixedLogits:
    """A model that has said everything already: float32 [num_seqs, V], the first rows of it each step."""

    def __init__(self, num_seqs: int, vocab_size: int) -> None:
        self._logits = torch.rand(num_seqs, vocab_size, generator=torch.Generator().manual_seed(0))

    def __call__(self, batch: Batch, cache: CacheStorage) -> Tensor:
        return self._logits[: len(batch.token_ids_T if batch.logit_rows_R is None else batch.logit_rows_R)]


class _Inline:
    """An executor without a thread, so that every microsecond falls into the step that caused it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        future.set_result(self._runner.execute(plan))
        return future

    def close(self) -> None:
        self._runner.close()


def measure_host(tokenizer: Tokenizer, num_seqs: int, steps: int, num_finished: int) -> HostTime:
    """Drive the loop: first `num_finished` requests to their ends, then `num_seqs` at once for `steps` decode steps."""
    output_len = 1 + WARMUP_STEPS + steps + 1  # the last is still to come when the measurement ends
    max_len = PROMPT_LEN + output_len
    blocks = num_seqs * -(-max_len // BLOCK_SIZE)
    vocab, cpu = tokenizer.vocab_size, torch.device("cpu")
    cache, sampling = CacheStorage([], blocks, num_seqs, BLOCK_SIZE, cpu), SamplingTable(num_seqs, vocab, device=cpu)
    slots = SlotTable(cache, sampling, max_len)
    runner = ModelRunner(_FixedLogits(num_seqs, vocab), slots, Sampler(sampling, sample), Mesh())
    scheduler = Scheduler(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * PROMPT_LEN,
        max_model_len=max_len,
        cache=CacheManager(blocks, num_seqs, BLOCK_SIZE),
        eos_token_ids=frozenset(),
        seed=0,
    )
    executor: Any = _Inline(runner)
    core, outputs = EngineCore(scheduler, executor), OutputProcessor(tokenizer, frozenset())
    _add(core, outputs, "finished", num_finished, 1)
    while core.has_work():
        _step(core, outputs)

    _add(core, outputs, "running", num_seqs, output_len)
    for _ in range(1 + WARMUP_STEPS):  # all prompts are one step
        _step(core, outputs)
    walls = []
    with tracing.record() as spans:
        for _ in range(steps):
            began = time.perf_counter_ns()
            _step(core, outputs)
            walls.append(time.perf_counter_ns() - began)
    core.close()

    names = [name for name in spans.durations if name not in DEVICE_SPANS]
    device = [sum(parts) for parts in zip(*(spans.durations[n] for n in DEVICE_SPANS), strict=True)]
    return HostTime(
        num_seqs=num_seqs,
        num_finished=num_finished,
        steps=steps,
        us_per_step=Spread.of((wall - d) / 1e3 for wall, d in zip(walls, device, strict=True)),
        spans_us={name: Spread.of(spans.durations[name]).median / 1e3 for name in names},
        sampler_us=Spread.of(spans.durations["sample"]).median / 1e3,
    )


def _add(core: EngineCore, outputs: OutputProcessor, name: str, count: int, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for i in range(count):
        prompt = [(i + j) % 256 for j in range(PROMPT_LEN)]
        request = Request(id=f"{name}-{i}", prompt_token_ids=prompt, params=params)
        core.add(request)
        outputs.add(request)


def _step(core: EngineCore, outputs: OutputProcessor) -> None:
    updates = core.step()
    with tracing.span("output"):
        for update in updates:
            outputs.process(update)
