"""Runs the engine on a batch of random prompts and records some of its steps, on every rank, into a Chrome trace."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thalweg import tracing
from thalweg.assembly.info import EngineInfo
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, SamplingParams
from thalweg.engine.offline import OfflineEngine, start_engine
from thalweg.errors import ConfigError, ThalwegError
from thalweg.recorder.join import JoinTask, join
from thalweg.recorder.orders import StartRecording, StopRecording, missing, read_recorded, rows_of_all
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
    if not config.one_host:
        raise ConfigError("a trace needs all ranks on one host; expected neither --nnodes nor Ray")
    config = replace(config, max_num_seqs=-(-batch_size // config.data_parallel_size))
    codec, share = load_codec(config), config.tensor_parallel_size
    ranks = share * config.data_parallel_size
    with tempfile.TemporaryDirectory(prefix="thalweg-") as name:
        folder = Path(name)
        engine = start_engine(config)
        info = engine.info
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

            started = False

            def start() -> None:
                nonlocal started
                started = True
                engine.order(StartRecording(str(folder), steps)).result()

            _run(engine, outputs, batch("warmup", WARMUP_TOKENS))
            if prefill:
                start()
            times = _run(
                engine,
                outputs,
                batch("profile", None),
                all_decode=lambda: None if prefill else start(),
                until=lambda: not missing(folder, ranks),
            )
            rows = []
            if started:
                engine.order(StopRecording()).result()
                _wait(folder, ranks)
                rows = rows_of_all(folder, ranks, share)
            if len(rows) < steps:
                raise ConfigError(
                    f"the requests ended after {len(rows)} of --steps {steps}: prompt and steps must fit into"
                    f" {info.max_model_len} tokens; lower --steps or --input-len, or raise --max-model-len or"
                    " --cache-memory"
                )
        finally:
            engine.close()
        try:
            join(folder, output, JoinTask(ranks, read_recorded(folder, 0), times))
        except OSError as e:
            raise ConfigError(f"--output is {str(output)!r}, which cannot be written: {e.strerror}") from None
    return Profile(info, rows)


def _wait(folder: Path, ranks: int) -> None:
    """Until every rank has written what it recorded."""
    deadline = time.monotonic() + WRITE_SECONDS
    while absent := missing(folder, ranks):
        if time.monotonic() > deadline:
            raise ThalwegError(f"ranks {absent} wrote no trace within {WRITE_SECONDS:g} s")
        time.sleep(0.01)


def _run(
    engine: OfflineEngine,
    outputs: OutputProcessor,
    requests: Sequence[Request],
    all_decode: Callable[[], None] = lambda: None,
    until: Callable[[], bool] = lambda: False,
) -> list[RequestTimes]:
    """Serve the requests to their ends, or `until` something is so. `all_decode` is called once all of them do, and
    have given a few tokens. Raises ConfigError if one fails."""
    times: dict[str, RequestTimes] = {}
    for request in requests:
        outputs.add(request)
        times[request.id] = RequestTimes(request.id, len(request.prompt_token_ids), time.perf_counter_ns())
    tokens = dict.fromkeys(times, 0)
    running, few = len(tokens), set(tokens)  # those that have not given enough tokens
    with engine.pump.running(requests) as news:
        while running and not until():
            updates = news()
            now = time.perf_counter_ns()
            with tracing.span("output"):
                for update in updates:
                    if update.error is not None:
                        raise ConfigError(f"a request of the profile failed: {update.error}")
                    outputs.process(update)
                    of_request = times[update.request_id]
                    of_request.first_token_ns = of_request.first_token_ns or (now if update.token_ids else 0)
                    tokens[update.request_id] += len(update.token_ids)
                    running -= update.finish_reason is not None
            few_before, few = few, {each for each in few if tokens[each] < WARMUP_TOKENS}
            if few_before and not few:
                all_decode()
    for request in requests:
        outputs.discard(request.id)
    return list(times.values())
