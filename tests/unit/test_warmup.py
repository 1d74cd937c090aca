"""The steps that run before an engine is ready: plans the runner can execute, within the memory there is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from thalweg import SamplingParams
from thalweg.assembly.rank import build_rank
from thalweg.assembly.warmup import plans, warm_up
from thalweg.cache.memory import MemorySplit
from thalweg.config.engine import EngineConfig
from thalweg.core import Admission, Prefill, StepPlan, pack_ids


def split(**sizes: int) -> MemorySplit:
    given = dict(num_slots=4, num_blocks=100, block_size=64, max_model_len=4096) | sizes
    return MemorySplit(**given, bytes_per_slot=0, bytes_per_block=0, memory_bytes=0)


@pytest.mark.parametrize(
    ("sizes", "budget"),
    [
        ({}, 2048),
        ({"num_slots": 1}, 2048),
        ({"num_blocks": 2}, 2048),
        ({"num_blocks": 1}, 2048),
        ({"num_blocks": 0}, 2048),
        ({"max_model_len": 2}, 2048),
        ({"max_model_len": 3}, 2048),
        ({"block_size": 1, "num_blocks": 9}, 2048),
        ({}, 1),
        ({"num_snapshots": 3}, 2048),
    ],
)
def test_plans_stay_within_limits(sizes: dict[str, int], budget: int) -> None:
    s = split(**sizes)
    for plan in plans(s, budget):
        blocks = [block for _, _, block in plan.new_blocks]
        assert len(set(blocks)) == len(blocks)
        assert all(1 <= block <= s.num_blocks for block in blocks)
        assert {p.slot for p in plan.prefills} | set(plan.decode_slots) <= set(range(1, s.num_slots + 1))
        for end in [p.start + p.length for p in plan.prefills] + [start + 1 for start in plan.decode_starts]:
            assert end <= s.max_model_len
            if s.num_blocks:
                assert end <= s.num_blocks // 2 * s.block_size
        assert all(p.length <= budget for p in plan.prefills)
        assert all(1 <= snapshot <= s.num_snapshots for _, snapshot in plan.snapshots + plan.restores)


def test_a_rehearsal_meets_every_kind_of_layer() -> None:
    runner, _ = build_rank(EngineConfig(), 0, "")
    model: Any = runner.model
    of_each = {(type(model.layers[i].attn), type(model.layers[i].mlp)) for i in model.one_of_each()}
    assert of_each == {(type(layer.attn), type(layer.mlp)) for layer in model.layers}
    assert len(of_each) == len(model.one_of_each()) < len(model.layers)


def test_a_request_after_them_gives_the_tokens_it_gives_without() -> None:
    def tokens(warm: bool) -> list[int]:
        runner, info = build_rank(EngineConfig(max_num_seqs=2, max_model_len=100), 0, "")
        if warm:
            sizes = dict(num_slots=info.num_slots, num_blocks=info.num_blocks, block_size=info.block_size)
            memory = split(**sizes, max_model_len=info.max_model_len)
            model: Any = runner.model
            steps = plans(memory, info.max_num_batched_tokens)
            runner.rehearse(partial(model, layers=model.one_of_each()), steps)
            assert runner.model is model
            warm_up(runner, memory, info.max_num_batched_tokens)
        params = SamplingParams(temperature=0, max_tokens=None)
        prompt = [5, 6, 7, 8]
        admission = Admission(1, "a", pack_ids(prompt), len(prompt), params, 0, False)
        first = StepPlan(0, [admission], [(1, 0, 1), (1, 1, 2)], [], [], [Prefill(1, 0, len(prompt), True)])
        found = list(runner.execute(first).token_ids)
        for i in range(5):
            found += runner.execute(StepPlan(1 + i, [], [], [1], [len(prompt) + i], [])).token_ids
        return found

    assert tokens(True) == tokens(False)
