"""The padded steps that graphs of data-parallel ranks are captured from, run eagerly on a CPU: same tokens as one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.models import random_checkpoint as kimi
from thalweg import LLM, SamplingParams
from thalweg.assembly import steps
from thalweg.config.engine import EngineConfig
from thalweg.core import Request
from thalweg.engine.start import Engine
from thalweg.runner.graphs import DecodeGraphs

PROMPTS = [[3 + i, 7, 11 * i % 100, 5] * (1 + 2 * i) for i in range(8)]
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 5,
    "max_num_batched_tokens": 32,
    "block_size": 8,
    "op_preference": {"experts": "reference"},  # which leaves out pairs; those in C++ do not
}
RANKS = 2


def params(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=3 + 5 * i, temperature=0, ignore_eos=True)


def answers(engine: Engine, numbers: list[int], wake: Callable[[], None]) -> dict[int, list[int]]:
    """Greedy tokens of the prompts of these numbers, on an engine that is one rank of several."""
    assert engine.lock_step is not None
    engine.lock_step.busy = bool(numbers)
    wake()
    found: dict[int, list[int]] = {}
    for i in numbers:
        engine.core.add(Request(id=str(i), prompt_token_ids=PROMPTS[i], params=params(i)))
        found[i] = []
    while engine.core.has_work():
        for update in engine.core.step():
            assert update.error is None
            found[int(update.request_id)] += update.token_ids
    engine.lock_step.busy = False
    return found


def test_same_tokens_as_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = kimi.config(experts=6)
    folder = kimi.write(tmp_path / "model", c, kimi.weights(c))
    with LLM(str(folder), **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])
        expected = {i: o.outputs[0].token_ids for i, o in enumerate(outputs)}

    monkeypatch.setattr(steps, "why_eager", lambda config, device, resolver, rows, most: rows == "prefills" and "so")
    kinds: list[str] = []
    run, idle = DecodeGraphs.run, DecodeGraphs.idle
    monkeypatch.setattr(DecodeGraphs, "run", lambda *a: (kinds.append("run"), run(*a))[1])
    monkeypatch.setattr(DecodeGraphs, "idle", lambda *a: (kinds.append("idle"), idle(*a))[1])
    config = EngineConfig(str(folder), data_parallel_size=RANKS, enable_expert_parallel=True, **OPTIONS)
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with ThreadPoolExecutor(RANKS) as pool:
        engines = list(pool.map(lambda rank: Engine(config, sockets, rank), range(RANKS)))
        barrier = threading.Barrier(RANKS)
        wakes = 0
        for shares in ([[0, 2, 4, 6], [1, 3, 5, 7]], [[7], []], [[], [1, 6]], [[0], [1, 2, 3, 4, 5, 6, 7]]):
            wakes += 1

            def one(rank: int, wakes: int = wakes, shares: list[list[int]] = shares) -> dict[int, list[int]]:
                barrier.wait(20)
                return answers(engines[rank], shares[rank], lambda: engines[rank].wake(wakes))

            for found in pool.map(one, range(RANKS)):
                assert found == {i: expected[i] for i in found}
        list(pool.map(lambda engine: engine.close(), engines))
    assert kinds.count("run") > 40
    assert kinds.count("idle") > 10
