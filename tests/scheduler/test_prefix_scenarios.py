"""The prefix cache case by case. Grid and blocks are of 4 tokens unless a test says otherwise."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.scheduler.device_simulator import Harness
from tests.scheduler.test_scheduler_properties import check_invariants


def harness(num_snapshots: int | None = 32, **options: Any) -> Harness:
    defaults = {"num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 64, "max_model_len": 256}
    return Harness(**{**defaults, **options}, keep_prefixes=True, num_snapshots=num_snapshots)


def tokens(n: int, start: int = 0) -> list[int]:
    return [2 + (start + i) % 37 for i in range(n)]


def ask(h: Harness, id: str, prompt: list[int], **params: object) -> int:
    """Runs a request by itself; how many of its prompt's tokens were cached."""
    h.add(id, prompt, **{"max_tokens": 3, "ignore_eos": True, "seed": 0, **params})
    h.drain()
    check_invariants(h)
    h.check_against_solo()
    return h.cached(id)


@pytest.mark.parametrize("num_snapshots", [32, None])
@pytest.mark.parametrize(
    ("length", "hit"), [(4, 0), (5, 4), (8, 4), (9, 8), (10, 8), (11, 8), (12, 8), (40, 36), (41, 40)]
)
def test_a_prompt_sent_twice_leaves_one_token_at_least(length: int, hit: int, num_snapshots: int | None) -> None:
    h = harness(num_snapshots)
    assert ask(h, "first", tokens(length)) == 0
    assert ask(h, "second", tokens(length)) == hit
    assert [p.start for p in h.plans[-3].prefills] == [hit]


@pytest.mark.parametrize(("length", "hit"), [(11, 8), (12, 12), (13, 12), (40, 40)])
def test_a_next_turn_begins_where_the_prompt_ended_if_that_is_on_the_grid(length: int, hit: int) -> None:
    h = harness()
    ask(h, "first", tokens(length), max_tokens=1)
    assert ask(h, "next turn", tokens(length) + tokens(5, 20)) == hit
    assert ask(h, "the same", tokens(length)) == (length - 1) // 4 * 4


@pytest.mark.parametrize("budget", [1, 3, 7])  # below the grid, prefills are cut there and states copied
def test_the_last_chunk_may_be_shorter_than_the_grid(budget: int) -> None:
    h = harness(max_num_batched_tokens=budget)
    ask(h, "first", tokens(10))
    assert ask(h, "second", tokens(10)) == 8


@pytest.mark.parametrize("budget", [5, 7, 10, 14])
def test_chunks_that_are_not_the_last_end_on_the_grid(budget: int) -> None:
    h = harness(max_num_batched_tokens=budget)
    ask(h, "long", tokens(50))
    ends = [p.start + p.length for plan in h.plans for p in plan.prefills]
    assert ends[-1] == 50
    assert not any(end % 4 for end in ends[:-1])


def test_decoding_beside_a_prefill_does_not_move_its_snapshot() -> None:
    h = harness(max_num_batched_tokens=8)
    h.add("other", tokens(3, 9), max_tokens=60, ignore_eos=True)
    for _ in range(5):
        h.step()
    assert ask(h, "first", tokens(30)) == 0
    h.add("more", tokens(2, 9), max_tokens=20, ignore_eos=True)
    assert ask(h, "second", tokens(30)) == 28


def test_a_snapshot_does_not_change_while_its_sequence_goes_on() -> None:
    h = harness()
    h.add("first", tokens(13), max_tokens=100, ignore_eos=True, seed=0)
    for _ in range(30):
        h.step()
    h.add("second", tokens(13), max_tokens=5, ignore_eos=True, seed=3)
    h.drain()
    h.check_against_solo()
    assert h.cached("second") == 12


def test_two_requests_begin_from_one_snapshot_in_one_step() -> None:
    h = harness()
    ask(h, "first", tokens(21))
    for id in "bc":
        h.add(id, tokens(20) + tokens(3, ord(id)), max_tokens=9, ignore_eos=True)
    plan = h.plan()
    assert len({slot for slot, _ in plan.restores}) == 2
    assert len({snapshot for _, snapshot in plan.restores}) == 1
    h.drain()
    h.check_against_solo()
    assert ask(h, "last", tokens(21)) == 20


def test_a_hit_ends_at_the_snapshot_although_more_blocks_are_known() -> None:
    h = harness()
    ask(h, "first", tokens(30))
    assert ask(h, "second", tokens(23) + [9] * 10) == 0
    reasons = h.scheduler.stats().prefix_misses
    assert (reasons["no_snapshot"], reasons["unseen"]) == (1, 1)
    assert ask(h, "third", tokens(23) + [8] * 10) == 20  # the branch was seen twice


def test_a_third_branch_begins_where_the_second_left_the_first() -> None:
    h = harness()
    for id, shared, hit in [("a", 22, 0), ("b", 22, 0), ("c", 22, 20), ("d", 17, 0), ("e", 17, 16), ("f", 22, 20)]:
        assert ask(h, id, tokens(shared) + [ord(id) % 40] * 7) == hit
    assert ask(h, "again", tokens(22) + [ord("a") % 40] * 7) == 28  # splitting its path took nothing from the first


def test_the_next_turn_begins_at_the_last_block_of_the_answer() -> None:
    h = harness()
    prompt = tokens(10)
    ask(h, "turn 1", prompt, max_tokens=33)
    turn = prompt + h.tokens("turn 1") + tokens(6, 20)
    assert ask(h, "turn 2", turn, max_tokens=9) == 40  # of 10 + 32 tokens that were computed
    changed = [*prompt, 3, *h.tokens("turn 1")]  # a template that puts something between
    assert ask(h, "other turn", changed) == 8


def test_answers_are_kept_on_the_grid_alone() -> None:
    h = harness(grid=12)
    ask(h, "long answer", tokens(10), max_tokens=105)  # its last block ends at 112
    for length in range(20, 100, 7):
        assert ask(h, f"{length}", (tokens(10) + h.tokens("long answer"))[:length], max_tokens=1) % 12 == 0
    assert ask(h, "all", tokens(10) + h.tokens("long answer"), max_tokens=1) == 108


def test_a_conversation_keeps_one_snapshot_of_its_decoding() -> None:
    h = harness()
    ask(h, "long answer", tokens(10), max_tokens=100)
    assert h.scheduler.stats().snapshots_used == 2  # the end of its prompt, and of its answer


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_rows_past_an_end_of_sequence_leave_no_snapshot(depth: int) -> None:
    """The answer ends around a block's end, when further rows are already under way."""
    for seed in range(40):
        h = harness(depth=depth)
        h.add("first", tokens(9), max_tokens=40, seed=seed)
        h.drain()
        for extra in ([], [1], [7, 7, 7, 7]):
            h.add(f"then {extra}", tokens(9) + h.tokens("first") + extra, max_tokens=8, seed=seed)
            h.drain()
        h.check_against_solo()


def test_an_interval_makes_every_part_of_a_long_prompt_usable() -> None:
    h = harness(interval=16)
    ask(h, "long", tokens(99))
    for shared, hit in [(95, 80), (70, 64), (40, 32), (17, 16)]:
        assert ask(h, f"{shared}", tokens(shared) + [5] * 9, max_tokens=1) == hit


def test_one_long_prompt_leaves_most_snapshots_to_others() -> None:
    h = harness(num_snapshots=16, interval=4, num_blocks=200)  # each short prompt takes two
    for i in range(6):
        ask(h, f"short {i}", tokens(10, 6 * i), max_tokens=1)
    ask(h, "long", tokens(200, 3), max_tokens=1)
    assert [ask(h, f"again {i}", tokens(10, 6 * i), max_tokens=1) for i in range(6)] == [8] * 6


def test_samples_of_one_prompt_share_one_prefill() -> None:
    h = harness()
    for i in range(4):
        h.add(f"{i}", tokens(41), max_tokens=6, ignore_eos=True, seed=i)
    h.drain()
    h.check_against_solo()
    assert [h.cached(f"{i}") for i in range(4)] == [0, 40, 40, 40]
    assert sum(p.length for plan in h.plans for p in plan.prefills) == 41 + 3
    assert len({tuple(h.tokens(f"{i}")) for i in range(4)}) > 1


def test_prompts_begin_while_samples_wait_for_their_first() -> None:
    """Four samples of each of eight prompts: two steps of prefill, in the order of arrival."""
    h = harness(max_num_seqs=32, max_num_batched_tokens=512, num_blocks=200)
    for i in range(8):
        for sample in range(4):
            h.add(f"{i}-{sample}", tokens(29, 4 * i), max_tokens=6, ignore_eos=True, seed=sample)
    h.drain()
    h.check_against_solo()
    prefills = [[a.request_id for a in plan.admissions] for plan in h.plans if plan.prefills]
    assert prefills[0] == [f"{i}-0" for i in range(8)]
    assert len(prefills) == 2
    assert sum(p.length for plan in h.plans for p in plan.prefills) == 8 * 29 + 24


@pytest.mark.parametrize("limit", [{"max_num_seqs": 4}, {"num_blocks": 16}, {"max_num_batched_tokens": 40}])
def test_who_waits_for_a_sample_loses_no_place_to_those_behind(limit: dict[str, int]) -> None:
    """Nor to one that would take several steps."""
    h = harness(**{"max_num_seqs": 8, "depth": 1, **limit})
    for sample in range(4):
        h.add(f"sample {sample}", tokens(29), max_tokens=9, ignore_eos=True, seed=sample)
    h.add("other", tokens(29, 9), max_tokens=9, ignore_eos=True)
    h.step()
    assert [a.request_id for a in h.plans[0].admissions] == ["sample 0"]
    h.step()
    assert [a.request_id for a in h.plans[1].admissions][:3] == [f"sample {i}" for i in (1, 2, 3)]
    h.drain()
    h.check_against_solo()


def test_other_salts_share_nothing() -> None:
    h = harness()
    assert ask(h, "a", tokens(20)) == 0
    assert ask(h, "b", tokens(20), cache_salt="b") == 0
    assert ask(h, "b again", tokens(20), cache_salt="b") == 16
    assert ask(h, "c", tokens(20), cache_salt="c") == 0
    assert h.scheduler.stats().prefix_misses["other_salt"] == 2


@pytest.mark.parametrize("option", [{"prompt_logprobs": 0}, {"prompt_logits": True}])
def test_a_report_of_every_prompt_token_computes_them_all(option: dict[str, object]) -> None:
    h = harness()
    ask(h, "first", tokens(20))
    assert ask(h, "second", tokens(20), **option) == 0
    rows = [u.prompt_logits or u.prompt_logprobs for u in h.updates["second"]]
    assert sum(len(row) for row in rows if row) in (19, 20)
    assert h.scheduler.stats().prefix_misses["prompt_wanted"] == 1
    assert ask(h, "third", tokens(20)) == 16


def test_aborted_in_its_prefill_only_what_was_computed_is_kept() -> None:
    h = harness(max_num_batched_tokens=8, depth=1)
    h.add("gone", tokens(40), ignore_eos=True)
    h.step()
    h.step()
    assert h.abort("gone")
    h.drain()
    check_invariants(h)
    assert ask(h, "next", tokens(40)) == 0
    assert ask(h, "after", tokens(40)) == 36


def test_aborted_in_its_answer_the_answer_so_far_is_kept() -> None:
    h = harness(depth=1)
    h.add("gone", tokens(10), max_tokens=100, ignore_eos=True, seed=0)
    for _ in range(30):
        h.step()
    assert h.abort("gone")
    said = h.tokens("gone")
    h.drain()
    assert ask(h, "next", tokens(10) + said + [4, 4, 4], max_tokens=5) == (10 + len(said) - 1) // 4 * 4


def test_what_a_failed_request_computed_is_forgotten() -> None:
    h = harness()
    ask(h, "good", tokens(9))
    h.device.errors["bad", 30] = "not finite"
    h.add("bad", tokens(29), ignore_eos=True)
    h.drain()
    assert h.updates["bad"][-1].finish_reason == "error"
    del h.requests["bad"]
    check_invariants(h)
    assert ask(h, "same", tokens(29)) == 8  # which the first one computed
    assert ask(h, "again", tokens(29)) == 28


@pytest.mark.parametrize("position", [32, 33])  # at the end of its prompt, and a step later
def test_a_failed_requests_snapshot_of_anothers_blocks_is_forgotten_too(position: int) -> None:
    h = harness()
    ask(h, "good", tokens(30))
    h.device.errors["bad", position] = "not finite"
    h.add("bad", tokens(22) + [9] * 10, ignore_eos=True)  # it leaves the first one's path at 20, and saves its states
    h.step()
    assert (1, 20) in [(slot, n) for slot, n, _ in h.plans[-1].boundaries]
    h.drain()
    del h.requests["bad"]
    assert ask(h, "same branch", tokens(22) + [8] * 10) == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_preempted_request_goes_on_from_its_own_prefix(depth: int) -> None:
    h = harness(num_blocks=22, max_num_seqs=2, depth=depth)
    h.add("old", tokens(40), max_tokens=9, ignore_eos=True)
    h.add("new", tokens(36, 9), max_tokens=9, ignore_eos=True)
    h.drain()
    h.check_against_solo()
    assert h.scheduler.stats().num_preemptions == 1
    plan = next(plan for plan in h.plans[1:] if plan.admissions)
    assert [a.request_id for a in plan.admissions] == ["new"]
    assert plan.prefills[0].start == 36
    assert h.cached("new") == 0  # when it was first admitted


@pytest.mark.parametrize("num_snapshots", [0, 1, 2, 32, None])
@pytest.mark.parametrize("num_blocks", [12, 20])
def test_eight_requests_that_share_under_pressure_give_everything_back(
    num_blocks: int, num_snapshots: int | None
) -> None:
    h = harness(num_snapshots, num_blocks=num_blocks, max_num_seqs=8)
    for i in range(8):
        h.add(f"{i}", tokens(17) + [i] * (i + 1), max_tokens=15, ignore_eos=True)
    while h.scheduler.has_work():
        h.step()
        check_invariants(h)
    h.drain()
    h.check_against_solo()
    stats = h.scheduler.stats()
    assert (stats.blocks_used, stats.slots_used) == (0, 0)


def test_earlier_turns_lose_their_snapshots_before_other_conversations_do() -> None:
    h = harness(num_snapshots=8)
    ask(h, "other", tokens(30, 5), max_tokens=9)
    prompt = tokens(20)
    for turn in range(12):
        assert ask(h, f"turn {turn}", prompt, max_tokens=10) == (0 if turn == 0 else (len(prompt) - 3) // 4 * 4)
        prompt = prompt + h.tokens(f"turn {turn}") + tokens(2, turn)
    assert ask(h, "other again", tokens(30, 5), max_tokens=1) == 28


def test_a_prefix_that_many_share_keeps_its_snapshot_under_pressure() -> None:
    h = harness(num_snapshots=4)
    hits = [ask(h, f"{i}", tokens(20) + [i] * 10, max_tokens=1) for i in range(12)]
    assert hits == [0, 0, *[20] * 10]


def test_a_short_answers_snapshot_goes_before_a_prompts() -> None:
    h = harness(num_snapshots=4)
    for i in range(4):
        ask(h, f"{i}", tokens(30, 7 * i), max_tokens=9)  # each wants two
    turns = [tokens(30, 7 * i) + h.tokens(f"{i}") + [5] * 3 for i in range(4)]
    assert [ask(h, f"turn {i}", turns[i], max_tokens=1) for i in range(4)] == [28, 28, 28, 28]


def share_of_hits(num_conversations: int, num_blocks: int, num_snapshots: int, host: tuple[int, int] = (0, 0)) -> float:
    """Of conversations of 5 turns that take turns at random, in tokens: 1 with room for all."""
    rng = random.Random(0)
    h = harness(num_snapshots, num_blocks=num_blocks, max_num_seqs=4, max_model_len=1000, host=host, slow=1)
    prompts = [[rng.randrange(40) for _ in range(60)] for _ in range(num_conversations)]
    could = found = 0
    for n, i in enumerate(rng.sample(list(range(num_conversations)) * 5, 5 * num_conversations)):
        known = len(prompts[i]) - 41 if len(prompts[i]) > 60 else 0  # but for what this turn adds
        h.add(f"{n}", prompts[i], max_tokens=20, ignore_eos=True)
        h.drain()
        could += known // 4 * 4
        found += h.cached(f"{n}")
        prompts[i] = prompts[i] + h.tokens(f"{n}") + [rng.randrange(40) for _ in range(60 - 20)]
    return found / could


def test_conversations_that_need_twice_the_room_hit_half_of_the_time() -> None:
    blocks, snapshots = 24 * 85, 24  # what they have at their end, and one snapshot for each
    assert share_of_hits(24, 2 * blocks, 2 * snapshots) > 0.95
    assert share_of_hits(24, 2 * blocks, snapshots) > 0.8
    assert share_of_hits(24, blocks // 2, snapshots // 2) > 0.4


def test_conversations_that_need_twice_the_room_hit_nearly_always_with_host_memory() -> None:
    blocks, snapshots = 24 * 85, 24
    unbounded = share_of_hits(24, 2 * blocks, 2 * snapshots)
    assert share_of_hits(24, blocks // 2, snapshots // 2, (blocks // 2, snapshots)) > 0.8 * unbounded
    assert share_of_hits(24, blocks // 2, snapshots // 2, (blocks, 2 * snapshots)) > 0.98 * unbounded


def test_an_evicted_snapshot_is_a_shorter_hit() -> None:
    h = harness(num_snapshots=4)
    ask(h, "a", tokens(21), max_tokens=1)
    for i in range(4):
        ask(h, f"other {i}", [30 + i] * 9, max_tokens=1)
    assert ask(h, "a again", tokens(21), max_tokens=1) == 0
    assert h.scheduler.stats().prefix_misses["evicted"] == 1


def test_evicted_blocks_take_their_snapshot_with_them() -> None:
    h = harness(num_blocks=10)
    ask(h, "a", tokens(21), max_tokens=1)
    ask(h, "b", [7] * 30, max_tokens=1)
    assert ask(h, "a again", tokens(21), max_tokens=1) == 0
    assert h.scheduler.stats().prefix_misses["evicted"] == 1


def test_a_request_that_waits_for_memory_takes_what_is_there_when_it_begins() -> None:
    """Between its look-up and its turn, the prefix is evicted."""
    h = harness(num_blocks=12, depth=1)
    ask(h, "a", tokens(17), max_tokens=1)
    h.add("big", [9] * 30, max_tokens=15, ignore_eos=True)
    h.step()
    h.add("b", tokens(17) + [5] * 12, max_tokens=4, ignore_eos=True)
    h.drain()
    h.check_against_solo()
    assert h.cached("b") < 16


def test_too_short_to_be_found() -> None:
    h = harness()
    assert [ask(h, f"{i}", [5, 6, 7, 8]) for i in range(2)] == [0, 0]
    assert h.scheduler.stats().prefix_misses["too_short"] == 2


def test_counts_are_in_tokens() -> None:
    h = harness()
    ask(h, "a", tokens(21))
    ask(h, "b", tokens(21))
    stats = h.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (42, 20)
    assert stats.prefix_misses["unseen"] == 1
    assert stats.blocks_kept == 5
    assert stats.blocks_used == 0


def test_why_a_request_missed_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    h = harness()
    with caplog.at_level("DEBUG", "thalweg.scheduler.prefixes"):
        ask(h, "first", tokens(30))
        ask(h, "second", tokens(23) + [9] * 10)
    assert caplog.messages == [
        "request first: 0 of 30 prompt tokens are cached, 0 were seen; the rest is unseen",
        "request second: 0 of 33 prompt tokens are cached, 20 were seen; the rest is no_snapshot",
    ]


def test_steps_in_which_nothing_is_restored_or_kept_say_nothing_of_it() -> None:
    h = harness()
    ask(h, "a", tokens(9), max_tokens=16)
    decodes = [plan for plan in h.plans if not plan.prefills]
    assert [bool(plan.snapshots) for plan in decodes] == [bool(plan.new_blocks) for plan in decodes]
    assert sum(bool(plan.snapshots) for plan in decodes) == 3
    assert not any(plan.restores for plan in h.plans)


def test_cached_tokens_are_told_once_however_often_a_request_gives_way() -> None:
    h = harness(8, num_blocks=12, max_num_seqs=4, max_model_len=48)
    ask(h, "first", tokens(13))
    for i, id in enumerate("abc"):
        h.add(id, [*tokens(13), 40 + i], max_tokens=20, ignore_eos=True)
    h.drain()
    assert h.scheduler.stats().num_preemptions > 0
    assert [h.cached(id) for id in "abc"] == [12, 12, 12]


@pytest.mark.parametrize("other_first", [False, True])
def test_a_plan_whose_making_is_interrupted_leaves_nothing_to_hit(
    monkeypatch: pytest.MonkeyPatch, other_first: bool
) -> None:
    """As by Ctrl-C in a script, which then aborts its requests and may ask again."""
    h = harness()

    def interrupt() -> None:
        raise KeyboardInterrupt

    h.add("interrupted", tokens(30), max_tokens=3, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(h.scheduler._roster, "prefilled", interrupt)
        with pytest.raises(KeyboardInterrupt):
            h.scheduler.schedule()
    h.abort("interrupted")
    h.scheduler.check_idle()
    if other_first:
        ask(h, "other", tokens(9, 20))
    assert ask(h, "again", tokens(30)) == 0
    assert ask(h, "once more", tokens(30)) == 28


def test_prompts_share_a_step_whatever_the_grid() -> None:
    """Of one that has room as a whole nothing is cut, so that it need not have room for a piece of the grid."""
    h = harness(block_size=127, grid=8128, num_blocks=400, max_num_seqs=64, max_num_batched_tokens=2048)
    for i in range(64):
        h.add(str(i), [2 + i % 30, 3 + i // 30, *tokens(48)], max_tokens=1, ignore_eos=True)
    h.drain()
    assert len(h.plans) == 2
    h.check_against_solo()


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_snapshots_that_no_kernel_writes_on_its_way_are_copied(chunk: int) -> None:
    """Blocks whose ends seldom are ends of chunks: prefills are cut there."""
    h = harness(block_size=7, grid=7, chunk=chunk, max_num_batched_tokens=64, interval=21)
    assert ask(h, "first", tokens(100)) == 0
    assert ask(h, "second", tokens(100)) == 98
    assert ask(h, "branch", tokens(50) + tokens(30, 11)) == 42
    assert ask(h, "again", tokens(50) + tokens(30, 12)) == 49


def test_an_answer_without_blocks_is_kept() -> None:
    h = harness(num_blocks=0)
    prompt = tokens(10)
    ask(h, "turn 1", prompt, max_tokens=33)
    assert h.scheduler.stats().snapshots_used == 2  # the end of its prompt, and of its answer
    assert ask(h, "turn 2", prompt + h.tokens("turn 1") + tokens(6, 20)) == 40


def test_a_long_path_without_blocks_is_evicted_at_once() -> None:
    """A model without paged layers has nothing to keep below its last snapshot."""
    h = harness(1, num_blocks=0, block_size=1, grid=1, max_num_batched_tokens=4096, max_model_len=4096)
    ask(h, "long", tokens(1500), max_tokens=1)
    ask(h, "other", tokens(10, 5), max_tokens=1)
    assert h.scheduler.cache.tree is not None
    assert h.scheduler.cache.tree.num_nodes < 20


# Host memory


@pytest.mark.parametrize("num_snapshots", [4, None])
def test_what_falls_out_of_the_device_comes_back(num_snapshots: int | None) -> None:
    h = harness(num_snapshots, num_blocks=12, host=(40, 20))
    for i in range(6):
        assert ask(h, f"{i}", tokens(21, 6 * i), max_tokens=1) == 0
    for i in range(6):
        assert ask(h, f"{i} again", tokens(21, 6 * i), max_tokens=1) == 20
    stats = h.scheduler.stats()
    assert 40 <= stats.prefix_host_hits <= 120
    assert stats.host_copies["blocks_fetched"] >= 20
    assert stats.host_blocks_used > 0


@pytest.mark.parametrize("slow", [0, 1, 3])
def test_a_request_waits_for_host_memory_while_others_run(slow: int) -> None:
    h = harness(4, num_blocks=24, max_num_seqs=2, host=(40, 20), slow=slow)
    ask(h, "first", tokens(41), max_tokens=1)
    ask(h, "displaces it", tokens(60, 5), max_tokens=1)
    h.add("runs", tokens(5, 20), max_tokens=30, ignore_eos=True)
    h.step()
    before = len(h.plans)
    h.add("again", tokens(41), max_tokens=3, ignore_eos=True)
    h.drain()
    plans = h.plans[before:]
    fetched = next(i for i, plan in enumerate(plans) if plan.host is not None and plan.host.block_fetches)
    begun = next(i for i, plan in enumerate(plans) if plan.admissions)
    assert (fetched, begun) == (0, 1 + slow)
    assert all(plan.decode_slots for plan in plans[: begun + 1])
    h.check_against_solo()
    assert h.cached("again") == 40


def test_others_begin_while_one_waits_for_host_memory() -> None:
    h = harness(4, num_blocks=30, max_num_seqs=4, host=(40, 20), slow=3)
    ask(h, "first", tokens(41), max_tokens=1)
    ask(h, "displaces it", tokens(90, 5), max_tokens=1)
    h.add("runs", tokens(5, 20), max_tokens=30, ignore_eos=True)
    h.step()
    h.add("again", tokens(41), max_tokens=3, ignore_eos=True)
    h.add("behind", tokens(9, 30), max_tokens=3, ignore_eos=True)
    h.drain()
    begun = [a.request_id for plan in h.plans for a in plan.admissions]
    assert begun[-2:] == ["behind", "again"]
    h.check_against_solo()
    assert h.cached("again") == 40


def test_nobody_waits_for_host_memory_while_nothing_runs() -> None:
    h = harness(4, num_blocks=12, host=(40, 20), slow=5)
    ask(h, "first", tokens(41), max_tokens=1)
    ask(h, "displaces it", tokens(41, 5), max_tokens=1)
    assert ask(h, "again", tokens(41), max_tokens=1) == 40
    assert h.plans[-1].host is not None
    assert h.plans[-1].admissions


def test_host_memory_gives_up_what_was_used_least_recently() -> None:
    h = harness(2, num_blocks=12, host=(20, 4))
    for i in range(8):
        ask(h, f"{i}", tokens(21, 4 * i), max_tokens=1)
    hits = [ask(h, f"{i} again", tokens(21, 4 * i), max_tokens=1) for i in (7, 6, 5, 4, 0, 1)]
    assert hits == [20, 20, 20, 20, 0, 0]


def test_one_long_prompt_leaves_most_of_host_memorys_snapshots_to_others() -> None:
    h = harness(4, num_blocks=60, interval=4, host=(400, 16), max_num_batched_tokens=8)
    for i in range(5):
        ask(h, f"short {i}", tokens(10, 6 * i), max_tokens=1)
    ask(h, "long", tokens(200, 3), max_tokens=1)
    ask(h, "displaces it", tokens(200, 9), max_tokens=1)
    assert [ask(h, f"again {i}", tokens(10, 6 * i), max_tokens=1) for i in range(5)] == [8] * 5


def test_what_a_failed_request_computed_leaves_host_memory_too() -> None:
    h = harness(2, num_blocks=40, host=(40, 20), max_num_batched_tokens=8)
    h.device.errors["bad", 60] = "not finite"
    h.add("bad", tokens(59), ignore_eos=True)  # several steps, in which others take its snapshots
    for i in range(3):
        h.add(f"{i}", tokens(9, 9 * i + 5), max_tokens=30, ignore_eos=True)
    h.drain()
    assert h.updates["bad"][-1].finish_reason == "error"
    del h.requests["bad"]
    check_invariants(h)
    assert ask(h, "same", tokens(59)) == 0


def test_a_plan_that_is_not_made_keeps_its_copies_for_the_next() -> None:
    """What displaced prefixes, and then was not run, does not lose them."""
    h = harness(4, num_blocks=12, max_num_seqs=1, host=(40, 20))
    ask(h, "first", tokens(41), max_tokens=1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    h.add("interrupted", tokens(41, 5), max_tokens=3, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h.scheduler._roster, "prefilled", interrupt)
        with pytest.raises(KeyboardInterrupt):
            h.scheduler.schedule()
    h.abort("interrupted")
    check_invariants(h)
    assert ask(h, "again", tokens(41), max_tokens=1) == 40


# What sessions keep


@pytest.mark.parametrize("host", [(0, 0), (4, 1)])
@pytest.mark.parametrize("num_snapshots", [4, None])
def test_what_is_kept_makes_room_last(num_snapshots: int | None, host: tuple[int, int]) -> None:
    h = harness(num_snapshots, num_blocks=20, host=host)
    ask(h, "kept", tokens(21), max_tokens=1)
    assert h.scheduler.keep("a", "", tokens(21)) == 20
    assert h.scheduler.keep("other salt", "mine", tokens(21)) == 0
    for i in range(20):
        ask(h, f"{i}", tokens(21, 3 * i + 5), max_tokens=1)
    assert ask(h, "again", tokens(21) + [9] * 8, max_tokens=1) == 20
    h.scheduler.release("a")
    for i in range(20):
        ask(h, f"more {i}", tokens(21, 3 * i + 5), max_tokens=1)
    assert ask(h, "after", tokens(21), max_tokens=1) == 0


def test_what_is_kept_makes_room_all_the_same_for_who_needs_all() -> None:
    h = harness(4, num_blocks=20)
    ask(h, "kept", tokens(21), max_tokens=1)
    h.scheduler.keep("a", "", tokens(21))
    ask(h, "large", tokens(75, 7), max_tokens=1)
    assert ask(h, "again", tokens(21), max_tokens=1) == 0
    h.scheduler.release("a")
    check_invariants(h)


def test_a_point_of_a_conversation_that_is_kept_outlives_what_went_past_it() -> None:
    h = harness(4)
    prompt = tokens(20)
    for turn in range(12):
        ask(h, f"turn {turn}", prompt, max_tokens=10)
        if turn == 1:
            h.scheduler.keep("point", "", prompt)
        prompt = prompt + h.tokens(f"turn {turn}") + tokens(2, turn)
    assert ask(h, "back", [*tokens(20), *h.tokens("turn 0"), *tokens(2, 0), 9, 9], max_tokens=1) == 32
