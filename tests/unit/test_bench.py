"""Spans, spreads, and the measurement of host time."""

from __future__ import annotations

import random
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from thalweg import tracing
from thalweg.bench.host import measure_host
from thalweg.bench.latency import check_context, check_lengths, measure_latency
from thalweg.bench.machine import describe_machine
from thalweg.bench.spread import Spread
from thalweg.config.model_source import model_folder
from thalweg.errors import ConfigError
from thalweg.tokenizer.load import load_tokenizer


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([1.0]).show(2) == "1.00 (1.00..1.00)"


def test_spans_are_kept_only_while_somebody_records() -> None:
    with tracing.span("before"):
        pass
    with tracing.record() as spans:
        for _ in range(3):
            with tracing.span("nap"):
                time.sleep(0.002)
        with pytest.raises(RuntimeError, match="already"), tracing.record():
            pass
    with tracing.span("after"):
        pass
    assert set(spans.durations) == {"nap"}
    assert len(spans.durations["nap"]) == 3
    assert all(ns >= 2_000_000 for ns in spans.durations["nap"])


def test_thread_time_leaves_waiting_out() -> None:
    with tracing.record(time.thread_time_ns) as spans, tracing.span("nap"):
        time.sleep(0.05)
    assert spans.durations["nap"][0] < 25_000_000


def test_a_span_ends_with_an_exception() -> None:
    with tracing.record() as spans, pytest.raises(KeyError), tracing.span("bad"):
        raise KeyError
    assert len(spans.durations["bad"]) == 1


def test_host_time_has_every_part_and_is_flat_in_finished_requests() -> None:
    tokenizer = load_tokenizer(model_folder(None))
    few = measure_host(tokenizer, num_seqs=16, steps=60, num_finished=0)
    many = measure_host(tokenizer, num_seqs=16, steps=60, num_finished=3000)
    assert set(few.spans_us) == {"schedule", "build", "update", "output"}
    assert few.us_per_step.min > 0
    assert few.us_per_step.median >= sum(few.spans_us.values()) * 0.5
    # The least of many steps is what a busy machine disturbs least.
    assert many.us_per_step.min < 2 * few.us_per_step.min + 50


def test_lengths_are_checked() -> None:
    check_lengths([1, 8], [1, 2], 1)
    with pytest.raises(ConfigError, match="--output-len"):
        check_lengths([1], [1], 0)
    check_context([8, 2], 4, 12)
    with pytest.raises(ConfigError, match="--input-len 9 and --output-len 4 are 13 tokens; expected at most 12"):
        check_context([2, 9], 4, 12)


def test_machine_is_plain_data() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["torch"]
    assert all(isinstance(value, str | int) for value in machine.values())


def test_no_prompt_of_latency_begins_like_another_whatever_its_size_and_length() -> None:
    asked: list[tuple[int, ...]] = []

    def generate(prompts: list[list[int]], params: Any) -> list[Any]:
        asked.extend(map(tuple, prompts))
        answer = SimpleNamespace(token_ids=[0] * params.max_tokens)
        return [SimpleNamespace(error=None, outputs=[answer]) for _ in prompts]

    info = SimpleNamespace(vocab_size=1000, max_num_batched_tokens=64, max_model_len=100, data_parallel_size=1)
    nothing: Future[None] = Future()
    nothing.set_result(None)
    llm: Any = SimpleNamespace(generate=generate, info=info, engine=SimpleNamespace(order=lambda order: nothing))
    rng = random.Random(0)
    for size in (1, 2, 8, 8):
        for length in (16, 32, 32):
            measure_latency(llm, size, length, 3, rng, num_iters_warmup=1, num_iters=2)
    assert len(asked) > 60
    assert len({prompt[:8] for prompt in asked}) == len(asked)
