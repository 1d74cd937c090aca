"""Latency of one batch at a time, in process: time to the first token, time per token after it, tokens/s.

All requests of a batch begin together and have the same lengths, so this is the engine at its quietest; serving
under load is another measurement.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thalweg import tracing
from thalweg.bench.spread import Spread
from thalweg.core import SamplingParams
from thalweg.errors import ConfigError, ThalwegError
from thalweg.recorder.orders import CountLaunches

if TYPE_CHECKING:
    from thalweg.bench.floor import Floor
    from thalweg.engine.llm import LLM

HOST_SPANS = ("schedule", "build", "update", "output")  # work of every step that is neither model nor sampler


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """Figures of one batch size. Times in milliseconds, host times in microseconds per step, medians over all steps.

    ttft is the time of a run that generates one token; tpot what each further token adds to it, and None when only
    one is asked for; e2el the time of the whole batch. host_us is processor time, since planning and bookkeeping run
    beside the model on another thread; host_us_per_step is its sum, and None with data-parallel ranks, which plan in
    processes of their own. launches counts a decode step's kernels and copies on rank 0's CUDA device, prompt_launches
    those from the prompts to their first tokens; both are None elsewhere.
    """

    batch_size: int
    input_len: int
    output_len: int
    num_iters: int
    ttft_ms: Spread
    tpot_ms: Spread | None
    e2el_ms: Spread
    output_throughput: float  # generated tokens/s of the median run
    host_us: dict[str, float]
    host_us_per_step: float | None
    launches: float | None
    prompt_launches: int | None
    floor: Floor | None = None  # for one rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names that serving benchmarks use (median_ttft_ms, output_throughput, ...)."""
        values: dict[str, Any] = {}
        for name in ("batch_size", "input_len", "output_len", "num_iters"):
            values[name] = getattr(self, name)
        for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
            spread = getattr(self, name)
            for part in ("median", "min", "max"):
                values[f"{part}_{name}"] = None if spread is None else getattr(spread, part)
        values["output_throughput"] = self.output_throughput
        values["host_us"], values["host_us_per_step"] = self.host_us, self.host_us_per_step
        values["launches_per_step"] = self.launches
        values["launches_of_prompts"] = self.prompt_launches
        values["floor"] = None if self.floor is None else self.floor.to_dict()
        return values


def measure_latency(
    llm: LLM,
    batch_size: int,
    input_len: int,
    output_len: int,
    rng: random.Random,
    *,
    num_iters_warmup: int,
    num_iters: int,
    temperature: float = 0.0,
) -> BatchLatency:
    """Run `num_iters` pairs of batches of random prompts, one token and `output_len` tokens long, after a warm-up.
    Data-parallel ranks have equal shares of a batch. Calls with the same `llm` share `rng`: no two prompts are alike,
    so that the prefix cache has none of them."""

    def time_batch(size: int, input_len: int, output_len: int) -> float:
        return _time_batch(llm, rng, size, input_len, output_len, temperature)

    firsts: list[float] = []
    wholes: list[float] = []
    host: defaultdict[str, list[int]] = defaultdict(list)  # nanoseconds, of whole runs
    for _ in range(num_iters_warmup):
        time_batch(batch_size, input_len, output_len)
    for _ in range(num_iters):
        if output_len > 1:
            firsts.append(time_batch(batch_size, input_len, 1))
        with tracing.record(time.thread_time_ns) as spans:
            wholes.append(time_batch(batch_size, input_len, output_len))
        for name in HOST_SPANS:
            host[name] += spans.durations[name]
    per_token = [(whole - first) / (output_len - 1) for first, whole in zip(firsts, wholes, strict=False)]
    e2el = Spread.of(1e3 * s for s in wholes)
    host_us = {name: Spread.of(durations).median / 1e3 for name, durations in host.items() if durations}
    plans_here = llm.info.data_parallel_size == 1
    return BatchLatency(
        batch_size=batch_size,
        input_len=input_len,
        output_len=output_len,
        num_iters=num_iters,
        ttft_ms=Spread.of(1e3 * s for s in firsts or wholes),
        tpot_ms=Spread.of(1e3 * s for s in per_token) if per_token else None,
        e2el_ms=e2el,
        output_throughput=batch_size * output_len / (e2el.median / 1e3),
        host_us=host_us,
        host_us_per_step=sum(host_us.values()) if plans_here else None,
        launches=_launches(llm, batch_size, time_batch),
        prompt_launches=_count(llm, lambda: time_batch(batch_size, input_len, 1)),
    )


def _launches(llm: LLM, batch_size: int, time_batch: Callable[[int, int, int], float]) -> float | None:
    """Kernels and copies of one decode step: what more of them a longer output has. Each data-parallel rank has as
    many requests as the fullest: ranks would have the larger share in turns otherwise."""
    short, long, ranks = 2, 10, llm.info.data_parallel_size
    size = -(-batch_size // ranks) * ranks
    input_len = max(1, min(16, llm.info.max_num_batched_tokens // size, llm.info.max_model_len - long))
    few, many = (_count(llm, lambda n=n: time_batch(size, input_len, n)) for n in (short, long))  # type: ignore[misc]
    return None if few is None or many is None else (many - few) / (long - short)


def _count(llm: LLM, run: Callable[[], float]) -> int | None:
    """Kernels and copies on rank 0's CUDA device during `run`, as the profiler counts."""
    llm.engine.order(CountLaunches(True)).result()
    run()
    count: int | None = llm.engine.order(CountLaunches(False)).result()
    return count


def check_lengths(batch_sizes: Sequence[int], input_lens: Sequence[int], output_len: int) -> None:
    """Raises ConfigError on a size or length below one."""
    least = {"--input-len": min(input_lens), "--output-len": output_len, "--batch-size": min(batch_sizes)}
    for option, value in least.items():
        if value < 1:
            raise ConfigError(f"{option} is {value}; expected 1 or more")


def check_context(input_lens: Sequence[int], output_len: int, max_model_len: int) -> None:
    """Raises ConfigError on the longest request, if it is too long, before those that are not are measured."""
    longest = max(input_lens)
    if longest + output_len > max_model_len:
        raise ConfigError(
            f"--input-len {longest} and --output-len {output_len} are {longest + output_len} tokens; expected at most"
            f" {max_model_len} (--max-model-len)"
        )


def _time_batch(
    llm: LLM, rng: random.Random, batch_size: int, input_len: int, output_len: int, temperature: float
) -> float:
    """Seconds that one batch takes, from handing it over to its last token."""
    vocab = llm.info.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(input_len)] for _ in range(batch_size)]
    params = SamplingParams(temperature=temperature, max_tokens=output_len, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    for output in outputs:
        if output.error is not None:
            raise ThalwegError(f"a request of the benchmark failed: {output.error}")
        if (count := len(output.outputs[0].token_ids)) != output_len:
            raise ConfigError(
                f"--input-len {input_len} and --output-len {output_len} do not fit: a request ended after {count}"
                " tokens; lower them, or raise --max-model-len or --cache-memory"
            )
    return seconds
