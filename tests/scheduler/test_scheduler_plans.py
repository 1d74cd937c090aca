"""Plans as data: what exactly a step is told to run."""

from __future__ import annotations

import pytest

from tests.scheduler.device_simulator import EOS, Harness
from thalweg.cache.manager import CacheManager
from thalweg.core import Admission, Prefill, Request, SamplingParams, StepPlan, pack_ids
from thalweg.errors import InvalidRequest
from thalweg.scheduler.scheduler import Scheduler
from thalweg.scheduler.sequence import derive_seed


def rows(plan: StepPlan | None) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, bool]]]:
    """(slot, start) of every decode, (slot, start, length, sample) of every prefill."""
    assert plan is not None
    decodes = list(zip(plan.decode_slots, plan.decode_starts, strict=True))
    return decodes, [(p.slot, p.start, p.length, p.sample) for p in plan.prefills]


def test_one_request_from_admission_to_decode() -> None:
    h = Harness(seed=7)
    h.add("a", [5, 6, 7, 8, 9], seed=3, ignore_eos=True)
    params = SamplingParams(max_tokens=None, seed=3, ignore_eos=True)
    assert h.plan() == StepPlan(
        0,
        [Admission(1, "a", pack_ids([5, 6, 7, 8, 9]), 5, params, 3, False)],
        [(1, 0, 1), (1, 1, 2)],
        [],
        [],
        [Prefill(1, 0, 5, True)],
    )
    # Three decodes ahead of any result; the block of position 8 comes with the row that fills it.
    assert h.plan() == StepPlan(1, [], [], [1], [5], [])
    assert h.plan() == StepPlan(2, [], [], [1], [6], [])
    assert h.plan() == StepPlan(3, [], [], [1], [7], [])
    assert h.plan() == StepPlan(4, [], [(1, 2, 3)], [1], [8], [])


def test_chunks_fill_the_step_beside_decodes() -> None:
    h = Harness(max_num_batched_tokens=4)
    h.add("a", [2] * 3, ignore_eos=True)
    h.add("b", [3] * 6, ignore_eos=True)
    h.add("c", [4] * 2, ignore_eos=True)
    assert rows(h.plan()) == ([], [(1, 0, 3, True), (2, 0, 1, False)])
    assert rows(h.plan()) == ([(1, 3)], [(2, 1, 3, False)])
    assert rows(h.plan()) == ([(1, 4)], [(2, 4, 2, True), (3, 0, 1, False)])
    assert rows(h.plan()) == ([(1, 5), (2, 6)], [(3, 1, 1, True)])
    assert rows(h.plan()) == ([(1, 6), (2, 7), (3, 2)], [])


def test_a_long_prompt_is_cut_beside_decodes_alone() -> None:
    h = Harness(max_num_batched_tokens=8, threshold=3)
    h.add("a", [2] * 8, ignore_eos=True)  # whole: nobody waits
    h.add("b", [3] * 7, ignore_eos=True)
    h.add("c", [4] * 3, ignore_eos=True)
    assert rows(h.plan()) == ([], [(1, 0, 8, True)])
    assert rows(h.plan()) == ([(1, 8)], [(2, 0, 3, False)])
    assert rows(h.plan()) == ([(1, 9)], [(2, 3, 3, False)])
    assert rows(h.plan()) == ([(1, 10)], [(2, 6, 1, True), (3, 0, 3, True)])
    assert rows(h.plan()) == ([(1, 11), (2, 7), (3, 3)], [])


def test_prompts_beside_decodes_have_two_thresholds_of_tokens_at_most() -> None:
    h = Harness(max_num_seqs=5, max_num_batched_tokens=30, threshold=3)
    h.add("a", [2] * 20, ignore_eos=True)
    h.plan()
    for i in range(4):
        h.add(f"short {i}", [3] * 2, ignore_eos=True)
    assert rows(h.plan()) == ([(1, 20)], [(2, 0, 2, True), (3, 0, 2, True), (4, 0, 2, True)])
    assert rows(h.plan())[1] == [(5, 0, 2, True)]


def test_samples_in_flight_count_towards_max_tokens_and_max_model_len() -> None:
    h = Harness(max_model_len=6)
    h.add("by tokens", [2, 2], max_tokens=2, ignore_eos=True)
    h.add("by context", [3, 3, 3], ignore_eos=True)
    h.add("by prefill", [3, 3, 3], max_tokens=0)
    assert rows(h.plan()) == ([], [(1, 0, 2, True), (2, 0, 3, True), (3, 0, 3, False)])
    assert rows(h.plan()) == ([(1, 2), (2, 3)], [])
    assert rows(h.plan()) == ([(2, 4)], [])
    assert h.plan() is None
    assert h.scheduler.has_work()
    h.drain()
    h.check_against_solo()


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    h = Harness(num_blocks=6, block_size=4)
    h.add("a", [2] * 8, max_tokens=9, ignore_eos=True)  # 2 blocks of 6, and 4 at its end
    h.add("b", [2] * 14, max_tokens=1)  # 4 blocks, but one must be left for a
    h.add("c", [2], max_tokens=1)
    for _ in range(9):
        assert all(p.slot == 1 for p in h.plan().prefills)
        assert [s.num_waiting for s in [h.scheduler.stats()]] == [2]
        h.collect()
    assert h.ended("a")
    assert [a.request_id for a in h.plan().admissions] == ["b", "c"]


def test_no_more_run_at_once_than_max_num_seqs_and_slots_are_used_again() -> None:
    h = Harness(max_num_seqs=2)
    for id in "abcd":
        h.add(id, [2, 3], max_tokens=2, ignore_eos=True)
    assert [a.slot for a in h.plan().admissions] == [1, 2]
    assert rows(h.plan()) == ([(1, 2), (2, 2)], [])
    assert h.plan() is None
    h.collect()
    assert h.plan() is None
    h.collect()
    assert [(a.request_id, a.slot) for a in h.plan().admissions] == [("c", 2), ("d", 1)]


def test_max_num_seqs_may_be_below_the_number_of_slots() -> None:
    scheduler = Scheduler(2, 16, 64, CacheManager(8, 4, 4), EOS, 0)
    for id in "abc":
        scheduler.add(Request(id=id, prompt_token_ids=[2], params=SamplingParams()))
    plan = scheduler.schedule()
    assert [a.request_id for a in plan.admissions] == ["a", "b"]
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.slots_used, stats.slots_total) == (2, 1, 2, 4)
    assert (stats.blocks_used, stats.blocks_total, stats.prompt_tokens) == (2, 8, 2)


def test_more_decodes_than_the_budget_take_turns() -> None:
    h = Harness(max_num_batched_tokens=3)
    for id in "abc":
        h.add(id, [2], ignore_eos=True)
    h.plan()
    h.scheduler.max_num_batched_tokens = 2
    served = [h.plan().decode_slots for _ in range(6)]
    assert served == [[1, 2], [1, 3], [2, 3], [1, 2], [1, 3], [2, 3]]


def test_growth_takes_the_blocks_of_whoever_arrived_last() -> None:
    h = Harness(num_blocks=5, block_size=4)
    h.add("old", [2] * 8, ignore_eos=True)
    h.add("new", [3] * 4, max_tokens=8, ignore_eos=True)
    plan = h.plan()
    assert plan.new_blocks == [(1, 0, 1), (1, 1, 2), (2, 0, 3)]
    assert h.plan().new_blocks == [(1, 2, 4), (2, 1, 5)]
    for _ in range(3):
        assert h.plan().decode_slots == [1, 2]
    plan = h.plan()  # old is at position 12, new at 8: no block is left for old but new's
    assert (plan.decode_slots, plan.decode_starts) == ([1], [12])
    assert [(slot, index) for slot, index, _ in plan.new_blocks] == [(1, 3)]
    assert plan.new_blocks[0][2] in (3, 5)
    assert h.scheduler.stats().num_preemptions == 1
    # The five tokens of new that were in flight are kept; it resumes with all of them when old is done.
    assert h.tokens("new") == []
    while not h.ended("old"):
        h.plan()
        h.collect()
    assert len(h.tokens("new")) == 5
    (admission,) = h.plan().admissions
    assert admission.token_ids == [3] * 4 + h.tokens("new")
    assert admission.num_prompt == 4
    h.drain()
    h.check_against_solo()
    assert h.scheduler.stats().prompt_tokens == 12


def test_the_one_that_arrived_last_gives_way_itself() -> None:
    h = Harness(num_blocks=5, block_size=4)
    h.add("old", [2] * 6, max_tokens=12, ignore_eos=True)
    h.add("new", [3] * 8, max_tokens=4, ignore_eos=True)
    h.plan()
    assert h.plan().decode_slots == [1, 2]  # new takes the fifth block
    assert h.plan().decode_slots == [1, 2]
    plan = h.plan()  # old is at 8
    assert plan.decode_slots == [1]
    assert h.scheduler.stats().num_preemptions == 1
    h.drain()
    h.check_against_solo()


def test_resumed_only_when_its_steps_are_done() -> None:
    h = Harness(num_blocks=3, block_size=4)
    h.add("old", [2] * 3, max_tokens=3, ignore_eos=True)
    h.add("new", [3] * 4, ignore_eos=True)
    h.plan()
    assert rows(h.plan()) == ([(1, 3), (2, 4)], [])
    assert rows(h.plan()) == ([(1, 4)], [])  # old takes new's block
    assert h.plan() is None
    for _ in range(2):
        h.collect()
        assert h.plan() is None
    h.collect()
    assert h.ended("old")
    (admission,) = h.plan().admissions
    assert admission.token_ids == [3] * 4 + h.tokens("new")
    assert len(h.tokens("new")) == 2


def test_a_preempted_prefill_starts_again() -> None:
    h = Harness(num_blocks=6, block_size=2, max_num_batched_tokens=2)
    h.add("old", [2] * 2, max_tokens=7, ignore_eos=True)
    h.add("new", [3] * 6, max_tokens=1)
    assert rows(h.plan()) == ([], [(1, 0, 2, True)])
    for i in range(4):
        assert rows(h.plan()) == ([(1, 2 + i)], [(2, i, 1, False)])
    assert rows(h.plan()) == ([(1, 6)], [])
    assert h.scheduler.stats().num_preemptions == 1
    assert rows(h.plan()) == ([(1, 7)], [])
    assert h.plan() is None
    while not h.ended("old"):
        h.collect()
    assert [rows(h.plan())[1][0][1:] for _ in range(3)] == [(0, 2, False), (2, 2, False), (4, 2, True)]
    h.drain()
    h.check_against_solo()


@pytest.mark.parametrize(
    ("prompt", "params", "option"),
    [
        ([], {}, "no tokens"),
        ([2] * 32, {}, "--max-model-len"),
        ([2] * 33, {"max_tokens": 0}, "--max-model-len"),
        ([2] * 21, {}, "--cache-memory"),
    ],
)
def test_refuses_what_could_never_run(prompt: list[int], params: dict, option: str) -> None:
    h = Harness(num_blocks=5, block_size=4, max_model_len=32)
    with pytest.raises(InvalidRequest, match=option) as e:
        h.add("a", prompt, **params)
    assert "\n" not in str(e.value)
    assert not h.scheduler.has_work()
    h.scheduler.check_idle()


def test_the_longest_prompts_are_accepted() -> None:
    h = Harness(num_blocks=0, max_model_len=32)
    h.add("a", [2] * 31, ignore_eos=True)
    h.add("b", [2] * 32, max_tokens=0)
    with pytest.raises(InvalidRequest, match="in use"):
        h.add("a", [2])
    h.drain()
    assert len(h.tokens("a")) == 1
    h.check_against_solo()
    h.add("a", [3])  # an id is free again after the end


def test_a_request_ends_where_the_cache_does() -> None:
    h = Harness(num_blocks=2, block_size=4, max_model_len=1000)
    h.add("a", [2] * 5, ignore_eos=True, max_tokens=100)
    h.drain()
    assert len(h.tokens("a")) == 4  # 8 cached tokens, and the one after them
    h.check_against_solo()


def test_seeds() -> None:
    def seeds(engine_seed: int) -> list[int]:
        cache = CacheManager(8, 4, 4)
        scheduler = Scheduler(4, 16, 64, cache, EOS, engine_seed)
        for id, seed in (("a", None), ("b", -1), ("c", None)):
            scheduler.add(Request(id=id, prompt_token_ids=[2], params=SamplingParams(seed=seed)))
        return [a.seed for a in scheduler.schedule().admissions]

    assert seeds(5) == [derive_seed(5, 0), 2**64 - 1, derive_seed(5, 2)]
    assert seeds(5) != seeds(6)
    many = {derive_seed(engine, arrival) for engine in range(30) for arrival in range(30)}
    assert len(many) == 900
    assert all(0 <= seed < 2**64 for seed in many)
