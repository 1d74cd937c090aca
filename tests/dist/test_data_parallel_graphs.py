"""Padded steps, of which graphs of data-parallel ranks are captured, run eagerly on a CPU: same tokens as one rank."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import random_checkpoint as kimi
from thalweg import LLM, SamplingParams
from thalweg.assembly import rank, steps
from thalweg.config.engine import EngineConfig
from thalweg.core import Request
from thalweg.engine.start import Engine
from thalweg.layers import expert_exchange
from thalweg.layers.expert_exchange import ExpertExchange
from thalweg.parallel.data_ranks import DataRanks, join_data_ranks
from thalweg.runner import prefill_graphs
from thalweg.runner.graphs import DecodeGraphs
from thalweg.runner.prefill_graphs import PrefillGraphs

PROMPTS = [[3 + i, 7, 11 * i % 100, 5] * (1 + 2 * i) for i in range(8)]
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 5,
    "max_num_batched_tokens": 32,
    "block_size": 8,
    "op_preference": {"experts": "reference"},  # which leaves out pairs; those in C++ do not
}


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "pads", "graphs"),
    [
        (2, False, False),
        (2, True, False),
        (2, True, True),
        (3, True, True),
        pytest.param(4, True, True, marks=pytest.mark.exhaustive),
    ],
)
def test_same_tokens_as_one_rank(
    size: int, pads: bool, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and decode rows on any of the ranks: in steps that pad their rows, as on GPUs, or only where all decode,
    and with prompts in shapes of graphs, of which some ranks fail to capture some, or without."""
    c = kimi.config(experts=12, top_k=3)
    folder = kimi.write(tmp_path / "model", c, kimi.weights(c))
    with LLM(str(folder), **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])
        expected = {i: o.outputs[0].token_ids for i, o in enumerate(outputs)}

    monkeypatch.setattr(
        steps, "why_eager", lambda config, device, resolver, rows, most: None if graphs or rows == "decodes" else "so"
    )
    kinds: Counter[str] = Counter()
    for kind, name in (
        (DecodeGraphs, "run"),
        (DecodeGraphs, "idle"),
        (PrefillGraphs, "run"),
        (PrefillGraphs, "idle"),
        (ExpertExchange, "__call__"),
        (ExpertExchange, "dispatch"),
    ):
        count(monkeypatch, kind, name, kinds)
    chance = random.Random(size)
    if graphs:
        capture_at_times(monkeypatch, chance)

    def join(*args: Any, **options: Any) -> DataRanks:
        ranks = join_data_ranks(*args, **options)
        ranks.pads = pads
        return ranks

    monkeypatch.setattr(rank, "join_data_ranks", join)
    monkeypatch.setattr(expert_exchange, "MOST_BYTES", 100 * size * 3 * c["hidden_size"] * 4)  # some steps take turns
    config = EngineConfig(str(folder), data_parallel_size=size, enable_expert_parallel=True, **OPTIONS)
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    everyone = [*range(len(PROMPTS))]
    with ThreadPoolExecutor(size) as pool:
        engines = list(pool.map(lambda rank: Engine(config, sockets, rank), range(size)))
        barrier = threading.Barrier(size)
        for wakes in range(1, 7):
            chance.shuffle(everyone)
            cuts = [0, *sorted(chance.choices(range(len(PROMPTS) + 1), k=size - 1)), len(PROMPTS)]
            shares = [everyone[a:b] for a, b in pairwise(cuts)]
            if wakes == 5:  # one rank alone
                shares = [[7, 1] if r == size - 1 else [] for r in range(size)]

            def one(rank: int, wakes: int = wakes, shares: list[list[int]] = shares) -> dict[int, list[int]]:
                barrier.wait(20)
                return answers(engines[rank], shares[rank], lambda: engines[rank].wake(wakes))

            for found in pool.map(one, range(size)):
                assert found == {i: expected[i] for i in found}
        list(pool.map(lambda engine: engine.close(), engines))
    assert kinds["DecodeGraphs.run"] > 40
    assert kinds["DecodeGraphs.idle"] > 10
    assert kinds["ExpertExchange.dispatch"] > 100
    assert (kinds["ExpertExchange.__call__"] > 10) == (not pads)
    assert (kinds["PrefillGraphs.run"] > 20) == (kinds["PrefillGraphs.idle"] > 3) == graphs, kinds


def capture_at_times(monkeypatch: pytest.MonkeyPatch, chance: random.Random) -> None:
    """Prompts' steps are captured as they are met again, as far as one can be without a device, or fail to be."""

    def capture(step: Any, pool: Any, cuts: Any) -> tuple[Any, Any]:
        if chance.random() < 0.3:
            raise torch.OutOfMemoryError("no memory: a test")
        return step, pool

    build = rank.build_rank

    def build_and_start(*args: Any, **options: Any) -> Any:
        runner, info = build(*args, **options)
        assert runner.prefill_graphs is not None
        runner.prefill_graphs._started = True
        return runner, info

    monkeypatch.setattr(prefill_graphs, "captured", capture)
    monkeypatch.setattr(rank, "build_rank", build_and_start)


def count(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, counts: Counter[str]) -> None:
    """Have calls of a method counted, by the names of its class and its own."""
    method = getattr(kind, name)

    def counted(*args: Any, **options: Any) -> Any:
        counts[f"{kind.__name__}.{name}"] += 1
        return method(*args, **options)

    monkeypatch.setattr(kind, name, counted)
