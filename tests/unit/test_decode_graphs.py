"""The static decode step (what a CUDA graph captures), run without capture: same tokens as the eager runner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import random_checkpoint as random
from tests.unit.test_recorded_steps import generate
from thalweg.assembly.rank import build_rank
from thalweg.assembly.warmup import plans
from thalweg.cache.memory import MemorySplit
from thalweg.config.engine import EngineConfig
from thalweg.ops.sample.reference import sample_over_ranks
from thalweg.parallel.mesh import Mesh
from thalweg.runner import step as step_module
from thalweg.runner.graphs import MAX_ROWS, DecodeGraphs, buckets


def test_buckets_end_at_the_most_and_rise() -> None:
    for most in (1, 2, 3, 7, 8, 64, 100, 128, 300, 1000):
        sizes = buckets(most)
        assert sizes[-1] == min(most, MAX_ROWS)
        assert sizes == sorted(set(sizes))
        assert all(b <= 2 * a + 1 for a, b in pairwise(sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(vocab=128, context=300)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


@pytest.mark.parametrize("divided", [False, True])
def test_static_steps_give_the_tokens_of_eager_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, divided: bool
) -> None:
    """Where ranks divide the vocabulary, logits are gathered for those rows alone that ask for more than an id."""
    expected = generate(folder, enforce_eager=True)
    calls: list[int] = []
    gathered: list[int] = []

    def gather(logits: torch.Tensor) -> torch.Tensor:
        gathered.append(len(logits))
        return logits

    def over_ranks(*given: torch.Tensor) -> torch.Tensor:
        return sample_over_ranks(*given, Mesh(), vocab=given[0].shape[1])

    class Uncaptured(DecodeGraphs):
        def run(self, d: int) -> tuple[torch.Tensor, Callable[[], list[int]]]:
            calls.append(d)
            return super().run(d)

    original = step_module.ModelRunner.__init__

    def with_static_steps(self: Any, *args: Any) -> None:
        args[2]._over_ranks = over_ranks
        original(self, *args[:4], graph_sizes=[1, 2, 4, 5], gather=gather if divided else None)

    monkeypatch.setattr(step_module, "DecodeGraphs", Uncaptured)
    monkeypatch.setattr(step_module.ModelRunner, "__init__", with_static_steps)
    assert generate(folder, enforce_eager=True) == expected
    assert len(calls) > 20
    assert len(set(calls)) > 2
    assert len(gathered) < len(calls)
    assert bool(gathered) == divided


def test_a_rehearsal_is_the_given_models_alone_and_capture_begins_on_the_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, info = build_rank(EngineConfig(max_num_seqs=3, max_model_len=100), 0, "")
    whole: Any = runner.model
    parts = (runner.slots, runner._sampler, runner.mesh)
    rows: list[list[list[int]]] = []

    class Captured(DecodeGraphs):
        def _captured(self, size: int) -> Any:
            lengths = self._rows[4].view(torch.int32)[:size]
            rows.append([*self._rows[:4, :size].tolist(), lengths.tolist()])

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("the whole model")

    monkeypatch.setattr(step_module, "DecodeGraphs", Captured)
    runner = step_module.ModelRunner(refuse, *parts, graph_sizes=[1, 3])
    memory = MemorySplit(info.num_slots, info.num_blocks, info.block_size, 100, 0, 0, 0)
    runner.rehearse(partial(whole, layers=whole.one_of_each()), plans(memory, 64))
    assert runner.model is refuse
    runner.capture()
    assert rows == [[[0] * n, [0] * n, [0] * n, [1] * n, [1] * n] for n in (3, 1)]
