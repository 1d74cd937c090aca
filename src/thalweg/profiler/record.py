"""Runs the engine on a batch of random prompts and records some of its steps into a Chrome trace."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thalweg import tracing
from thalweg.build.info import EngineInfo
from thalweg.build.rank import build_rank
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, SamplingParams
from thalweg.engine.core import EngineCore
from thalweg.engine.start import new_scheduler
from thalweg.errors import ConfigError
from thalweg.profiler.requests import RequestTimes, write_with_requests
from thalweg.profiler.window import WindowedRunner, start_profiler
from thalweg.runner.executor import Executor
from thalweg.text.codec import load_codec
from thalweg.text.output import OutputProcessor

WARMUP_TOKENS = 4  # of a whole batch before the one that is recorded, and of that one before the window opens


@dataclass(frozen=True, slots=True)
class Recorded:
    """The engine, and of each recorded step the decode rows and prompt tokens it had."""

    info: EngineInfo
    rows: list[tuple[int, int]]


def record_steps(
    config: EngineConfig, output: Path, *, steps: int, batch_size: int, input_len: int, prefill: bool
) -> Recorded:
    """Record `steps` steps of `batch_size` requests of `input_len` random tokens into `output`, .json or .json.gz.

    The window opens once all requests decode, or with `prefill` before their prompts. Raises ConfigError where the
    requests end before the window does or `output` cannot be written, and what starting an engine raises.
    """
    if config.tensor_parallel_size != 1:
        raise ConfigError("--tensor-parallel-size does not go with profile, which records one rank; leave it out")
    config = replace(config, max_num_seqs=batch_size)
    codec = load_codec(config)
    start_profiler()

    def build() -> tuple[WindowedRunner, tuple[EngineInfo, WindowedRunner]]:
        runner, info = build_rank(config, 0, "")
        windowed = WindowedRunner(runner, steps)
        return windowed, (info, windowed)

    executor = Executor(build)
    try:
        info, window = executor.info()
        core = EngineCore(new_scheduler(info, config.seed), executor)
        outputs = OutputProcessor(codec.tokenizer, frozenset(info.eos_token_ids), late=True)
        rng = random.Random(config.seed)

        def batch(name: str, max_tokens: int | None) -> list[Request]:
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            prompts = ([rng.randrange(info.vocab_size) for _ in range(input_len)] for _ in range(batch_size))
            return [
                Request(id=f"{name}-{i}", prompt_token_ids=prompt, params=params) for i, prompt in enumerate(prompts)
            ]

        _run(core, outputs, batch("warmup", WARMUP_TOKENS))
        window.arm(0 if prefill else WARMUP_TOKENS)
        times = _run(core, outputs, batch("profile", None), window)
    finally:
        executor.close()
    if not window.closed or len(window.rows) < steps:
        raise ConfigError(
            f"the requests ended after {len(window.rows)} of --steps {steps}: prompt and steps must fit into"
            f" {info.max_model_len} tokens; lower --steps or --input-len, or raise --max-model-len or --cache-memory"
        )
    with tempfile.TemporaryDirectory(prefix="thalweg-") as folder:
        recorded = Path(folder) / "trace.json"
        window.export(recorded)
        try:
            write_with_requests(recorded, output, times, window.began_ns, window.ended_ns)
        except OSError as e:
            raise ConfigError(f"--output is {str(output)!r}, which cannot be written: {e.strerror}") from None
    return Recorded(info, window.rows)


def _run(
    core: EngineCore, outputs: OutputProcessor, requests: Sequence[Request], window: WindowedRunner | None = None
) -> list[RequestTimes]:
    """Serve the requests to their ends, or until the window has closed. Raises ConfigError if one fails."""
    times = {}
    for request in requests:
        core.add(request)
        outputs.add(request)
        times[request.id] = RequestTimes(request.id, len(request.prompt_token_ids), time.perf_counter_ns())
    while core.has_work():
        updates = core.step()
        now = time.perf_counter_ns()
        with tracing.span("output"):
            for update in updates:
                if update.error is not None:
                    raise ConfigError(f"a request of the profile failed: {update.error}")
                outputs.process(update)
                if update.token_ids and not times[update.request_id].first_token_ns:
                    times[update.request_id].first_token_ns = now
        if window is not None and window.closed:
            for request in requests:
                core.abort(request.id)
                outputs.discard(request.id)
            window = None  # what is in flight still has to be taken in
    return list(times.values())
