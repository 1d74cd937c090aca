"""How requests end, and what is told on the way."""

from __future__ import annotations

import pytest

from tests.scheduler.device_simulator import EOS, Harness
from thalweg.core import RequestUpdate, StepResult


def answer(h: Harness, *token_ids: int, **more: object) -> list[RequestUpdate]:
    """Gives the oldest plan this result, whatever a device would say."""
    plan = h.pending.popleft()
    return h.scheduler.update(plan, StepResult(plan.step, list(token_ids), **more))


def started(depth: int = 0, **params: object) -> Harness:
    """One request "a" that has its prefill planned, and `depth` decodes."""
    h = Harness()
    h.add("a", [5, 6, 7], **params)
    for _ in range(depth + 1):
        h.plan()
    return h


def test_eos_ends_and_the_steps_behind_it_are_dropped() -> None:
    h = started(depth=2)
    (eos,) = EOS - {0}
    assert answer(h, 9) == [RequestUpdate("a", [9])]
    assert answer(h, eos) == [RequestUpdate("a", [eos], "stop", eos)]
    h.scheduler.check_idle()  # freed at once
    assert answer(h, 4) == []
    assert h.scheduler.stats().generation_tokens == 2


def test_ignore_eos_and_stop_token_ids() -> None:
    h = started(depth=3, ignore_eos=True, stop_token_ids=(11,))
    assert answer(h, 1)[0].finish_reason is None
    assert answer(h, 11) == [RequestUpdate("a", [11], "stop", 11)]


def test_no_end_within_min_tokens() -> None:
    h = started(depth=3, min_tokens=2, stop_token_ids=(11,))
    assert answer(h, 11)[0].finish_reason is None
    assert answer(h, 1)[0].finish_reason is None
    assert answer(h, 1)[0].finish_reason == "stop"


def test_stop_wins_over_length() -> None:
    h = started(depth=1, max_tokens=2)
    answer(h, 9)
    assert answer(h, 1) == [RequestUpdate("a", [1], "stop", 1)]


def test_length() -> None:
    h = started(depth=1, max_tokens=2)
    answer(h, 9)
    assert answer(h, 9) == [RequestUpdate("a", [9], "length")]
    h.scheduler.check_idle()


def test_max_tokens_0_ends_with_its_prefill() -> None:
    h = Harness(max_num_batched_tokens=2)
    h.add("a", [5, 6, 7], max_tokens=0)
    assert [p.sample for _ in range(2) for p in h.plan().prefills] == [False, False]
    assert answer(h) == []
    assert answer(h) == [RequestUpdate("a", [], "length")]
    h.scheduler.check_idle()


def test_an_error_ends_one_request_alone() -> None:
    h = Harness(max_num_batched_tokens=8)
    h.add("a", [5])
    h.add("b", [5] * 3)
    h.add("c", [5] * 9)
    h.plan()
    told = answer(h, 9, 9, errors={2: "bad row"})
    assert told == [RequestUpdate("a", [9]), RequestUpdate("b", [], "error", None, "bad row")]
    h.plan()
    told = answer(h, 8, 8, errors={1: "worse", 3: "worst"})
    assert told == [
        RequestUpdate("a", [], "error", None, "worse"),
        RequestUpdate("c", [], "error", None, "worst"),
    ]
    h.scheduler.check_idle()


def test_an_error_in_a_chunk_that_does_not_sample() -> None:
    h = Harness(max_num_batched_tokens=2)
    h.add("a", [5] * 5)
    h.plan()
    h.plan()
    assert answer(h, errors={1: "bad"}) == [RequestUpdate("a", [], "error", None, "bad")]
    assert answer(h) == []
    h.scheduler.check_idle()


def test_logprobs_are_passed_on() -> None:
    h = Harness()
    h.add("a", [5, 6], logprobs=0, max_tokens=3, ignore_eos=True)
    h.add("b", [5, 6], max_tokens=3, ignore_eos=True)
    h.drain()
    assert [u.logprobs.token_id for u in h.updates["a"]] == h.tokens("a")
    assert all(u.logprobs is None for u in h.updates["b"])


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("max_tokens", [0, 6])
def test_every_prompt_position_is_told_once_despite_preemption(depth: int, max_tokens: int) -> None:
    h = Harness(num_blocks=9, block_size=2, max_num_batched_tokens=3, depth=depth)
    prompt = list(range(2, 14))
    h.add("old", [2] * 2, max_tokens=16, ignore_eos=True)
    h.add("new", prompt, True, prompt_logprobs=0, max_tokens=max_tokens, ignore_eos=True)
    h.drain()
    h.check_against_solo()
    assert h.scheduler.stats().num_preemptions > 0
    updates = h.updates["new"]
    assert [row for u in updates for row in u.prompt_logits or []] == list(range(12))
    assert [e.token_id for u in updates for e in u.prompt_logprobs or []] == prompt[1:]
    assert all(u.prompt_logprobs is None or u.prompt_logprobs for u in updates)
    assert [u.finish_reason for u in updates[:-1]] == [None] * (len(updates) - 1)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("phase", ["waiting", "prefilling", "decoding", "preempted"])
def test_abort_frees_at_once(phase: str, depth: int) -> None:
    h = Harness(num_blocks=5, block_size=4, max_num_batched_tokens=4, max_num_seqs=2)
    h.add("keep", [2] * 8, max_tokens=12, ignore_eos=True)
    h.add("gone", [3] * 4, ignore_eos=True)
    steps = {"waiting": 1, "prefilling": 3, "decoding": 5, "preempted": 12}[phase]
    for _ in range(steps):
        h.plan()
        while len(h.pending) > depth:
            h.collect()
    stats = h.scheduler.stats()
    assert (stats.num_waiting == 1) == (phase in ("waiting", "preempted"))
    assert (stats.num_preemptions == 1) == (phase == "preempted")
    assert h.abort("gone")
    assert not h.abort("gone")
    assert h.scheduler.stats().slots_used == 1
    h.add("gone too", [4] * 3, max_tokens=5)  # takes its slot and blocks while its rows are in flight
    h.drain()
    h.check_against_solo()
    assert not h.abort("keep")


def test_results_out_of_order_are_a_bug() -> None:
    h = started(depth=1)
    first, second = h.pending
    with pytest.raises(RuntimeError, match="expected step 0"):
        h.scheduler.update(second, StepResult(second.step, [9]))
    with pytest.raises(RuntimeError, match="gave 2 tokens; expected 1"):
        h.scheduler.update(first, StepResult(first.step, [9, 9]))
    h.scheduler.update(first, StepResult(first.step, [9]))
    with pytest.raises(RuntimeError, match="expected step 1"):
        h.scheduler.update(first, StepResult(first.step, [9]))


def test_check_idle_names_what_is_left() -> None:
    h = started()
    with pytest.raises(RuntimeError, match="'a'"):
        h.scheduler.check_idle()
    h.scheduler.cache.admit("ghost", 5)
    h.abort("a")
    with pytest.raises(RuntimeError, match=r"blocks \[2, 3\], slots \[2\], held by sequences \['ghost'\]"):
        h.scheduler.check_idle()
