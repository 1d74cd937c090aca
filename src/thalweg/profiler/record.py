"""Runs the engine on a batch of random prompts and records some of its steps, on every rank, into a Chrome trace."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thalweg import tracing
from thalweg.assembly.info import EngineInfo
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, SamplingParams
from thalweg.engine.recording import Limits, Recording
from thalweg.engine.start import Engine
from thalweg.errors import ConfigError, ThalwegError
from thalweg.recorder.join import JoinTask, join
from thalweg.recorder.orders import Recorded
from thalweg.recorder.requests import RequestTimes
from thalweg.text.codec import load_codec
from thalweg.text.output import OutputProcessor

WARMUP_TOKENS = 4  # of a whole batch before the one that is recorded, and of that one before the window opens
WRITE_SECONDS = 120.0  # for the ranks to write what they recorded


@dataclass(frozen=True, slots=True)
class Profile:
    """The engine, and of each recorded step the decode rows and prompt tokens it had."""

    info: EngineInfo
    rows: list[tuple[int, int]]


def record_steps(
    config: EngineConfig, output: Path, *, steps: int, batch_size: int, input_len: int, prefill: bool
) -> Profile:
    """Record `steps` steps of `batch_size` requests of `input_len` random tokens into `output`, .json or .json.gz.

    The window opens once all requests decode, or with `prefill` before their prompts. Raises ConfigError where the
    requests end before the window does or `output` cannot be written, and what starting an engine raises.
    """
    config = replace(config, max_num_seqs=batch_size)
    codec = load_codec(config)
    with tempfile.TemporaryDirectory(prefix="thalweg-") as name:
        folder = Path(name)
        engine = Engine(config)
        info, recording = engine.info, engine.recording
        try:
            outputs = OutputProcessor(codec.tokenizer, frozenset(info.eos_token_ids), late=True)
            rng = random.Random(config.seed)

            def batch(name: str, max_tokens: int | None) -> list[Request]:
                params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                prompts = ([rng.randrange(info.vocab_size) for _ in range(input_len)] for _ in range(batch_size))
                return [
                    Request(id=f"{name}-{i}", prompt_token_ids=prompt, params=params)
                    for i, prompt in enumerate(prompts)
                ]

            _run(engine, outputs, batch("warmup", WARMUP_TOKENS))
            recording.start(folder, Limits(steps), after=0 if prefill else WARMUP_TOKENS)
            times = _run(engine, outputs, batch("profile", None), until_closed=True)
            if len(recording.rows) < steps:
                raise ConfigError(
                    f"the requests ended after {len(recording.rows)} of --steps {steps}: prompt and steps must fit into"
                    f" {info.max_model_len} tokens; lower --steps or --input-len, or raise --max-model-len or"
                    " --cache-memory"
                )
            recorded = _result(recording)
        finally:
            engine.close()
        try:
            join(folder, output, JoinTask(config.tensor_parallel_size, recorded, times))
        except OSError as e:
            raise ConfigError(f"--output is {str(output)!r}, which cannot be written: {e.strerror}") from None
    return Profile(info, recording.rows)


def _result(recording: Recording) -> Recorded:
    deadline = time.monotonic() + WRITE_SECONDS
    while (recorded := recording.result()) is None:
        if time.monotonic() > deadline:
            raise ThalwegError(f"ranks {recording.missing()} wrote no trace within {WRITE_SECONDS:g} s")
        time.sleep(0.01)
    return recorded


def _run(
    engine: Engine, outputs: OutputProcessor, requests: Sequence[Request], until_closed: bool = False
) -> list[RequestTimes]:
    """Serve the requests to their ends, or until the window has closed. Raises ConfigError if one fails."""
    core, times = engine.core, {}
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
        if until_closed and engine.recording.closed:
            for request in requests:
                core.abort(request.id)
                outputs.discard(request.id)
            until_closed = False  # what is in flight still has to be taken in
    return list(times.values())
