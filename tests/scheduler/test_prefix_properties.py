"""Whatever is shared, evicted, aborted, preempted or planned ahead: with prefixes kept, tokens are a cold run's."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.device_simulator import Harness
from tests.scheduler.test_scheduler_properties import check_invariants, check_prompt_rows, run
from thalweg.cache import image
from thalweg.cache.tiers import TieredTree

# Prompts that begin alike: from a tree of few tokens, in pieces of a few lengths.
piece = st.tuples(st.integers(2, 4), st.sampled_from([1, 2, 3, 4, 8]))
prompts = st.lists(piece, min_size=1, max_size=4).map(lambda pieces: [t for t, n in pieces for _ in range(n)])
params = st.fixed_dictionaries(
    {
        "max_tokens": st.sampled_from([None, 0, 1, 5, 12, 20]),
        "ignore_eos": st.sampled_from([True, True, False]),
        "seed": st.sampled_from([0, 0, 1, None]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
        "cache_salt": st.sampled_from(["", "", "other"]),
    }
)
add = st.tuples(st.just("add"), prompts, params, st.sampled_from([False, False, False, True]))
again = st.tuples(st.just("again"), st.integers(0, 30), st.integers(0, 12), params)
abort = st.tuples(st.just("abort"), st.integers(0, 30))
step = st.tuples(st.just("step"), st.integers(1, 5))
keep = st.tuples(st.sampled_from(["keep", "release"]), st.integers(0, 30))
events = st.lists(st.one_of(add, again, again, step, step, abort, keep, st.just(("plan",))), min_size=10, max_size=40)
limits = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([0, 3, 5, 8, 12, 20, 40]),
        "block_size": st.sampled_from([1, 2, 4]),
        "max_num_seqs": st.sampled_from([1, 2, 3, 5]),
        "max_num_batched_tokens": st.sampled_from([1, 2, 3, 5, 16, 64]),
        "max_model_len": st.integers(8, 40),
        "seed": st.integers(0, 2**64 - 1),
        "depth": st.integers(0, 3),
        "num_snapshots": st.sampled_from([None, 1, 2, 3, 8, 30]),
        "host": st.sampled_from([(0, 0), (0, 0), (1, 1), (4, 2), (60, 20)]),
        "slow": st.integers(0, 3),
    }
)
more_limits = st.tuples(  # grid in blocks, interval in grids, chunk in tokens
    st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 5]), st.sampled_from([None, None, 1, 3])
)


def harness(limits: dict[str, Any], more: tuple[int, int, int | None]) -> Harness:
    grid = limits["block_size"] * more[0]
    if limits["num_blocks"] == 0 and limits["num_snapshots"] is None:
        limits = {**limits, "num_snapshots": 2}  # without blocks and states there is no model
    return Harness(**limits, keep_prefixes=True, grid=grid, interval=grid * more[1], chunk=more[2])


def replay(h: Harness, script: list[Any]) -> None:
    """`run`, with the event "again": what a request was and gave, and a few tokens more, as a conversation goes on."""
    for i, event in enumerate(script):
        if event[0] == "again" and h.requests:
            _, index, more, options = event
            name = list(h.requests)[index % len(h.requests)]
            prompt = [*h.requests[name].prompt_token_ids, *h.tokens(name), *[5] * more]
            event = ("add", prompt, options, False)
        if event[0] == "add":
            _, prompt, options, logits = event
            if len(prompt) < h.scheduler.max_model_len and len(prompt) <= h.scheduler.cache.max_tokens:
                h.add(f"r{i}", prompt, logits, **options)
                check_invariants(h)
        elif event[0] == "abort" and h.requests:
            name = list(h.requests)[event[1] % len(h.requests)]
            if name not in h.aborted and not h.ended(name):
                h.abort(name)
            check_invariants(h)
        elif event[0] in ("keep", "release") and h.requests:
            name = list(h.requests)[event[1] % len(h.requests)]
            if event[0] == "keep":
                h.scheduler.keep(name, "", h.requests[name].prompt_token_ids)
            else:
                h.scheduler.release(name)
            check_invariants(h)
        elif event[0] in ("step", "plan"):
            run(h, [event])


def finish(h: Harness) -> None:
    while h.scheduler.has_work() or h.pending:
        h.step()
        check_invariants(h)
    h.scheduler.check_idle()
    h.check_against_solo()
    check_prompt_rows(h)
    stats = h.scheduler.stats()
    assert stats.blocks_used == 0
    assert stats.blocks_kept + h.scheduler.cache.blocks.num_free == stats.blocks_total


@settings(max_examples=600, derandomize=True, deadline=None)
@given(limits, more_limits, events)
def test_tokens_are_those_of_a_cold_run(
    limits: dict[str, Any], more: tuple[int, int, int | None], script: list[Any]
) -> None:
    h = harness(limits, more)
    replay(h, script)
    finish(h)


@pytest.mark.parametrize("seed", range(24))
def test_fuzz_over_shared_trees(seed: int) -> None:
    """1,000 requests over 20 trees in all, with aborts and tight pools."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    limits = {
        "num_blocks": rng.choice([40, 60, 160]) // block_size,
        "block_size": block_size,
        "max_num_seqs": rng.choice([3, 6]),
        "max_num_batched_tokens": rng.choice([2, 5, 16, 64]),
        "max_model_len": 40,
        "seed": seed,
        "depth": seed % 4,
        "num_snapshots": rng.choice([None, 2, 6, 40]),
        "host": rng.choice([(0, 0), (5, 2), (100, 40)]),
        "slow": rng.choice([0, 2]),
    }
    h = harness(limits, (rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([None, 3])))
    trees = [[rng.randrange(40) for _ in range(24)] for _ in range(3)]
    script: list[Any] = []
    for _ in range(160):
        kind = rng.choice(["add", "again", "step", "step", "step", "plan", "abort", "keep", "release"])
        options = {"max_tokens": rng.choice([None, 0, 1, 5, 30]), "ignore_eos": rng.random() < 0.7, "seed": 0}
        if kind == "add":
            tree, own = rng.choice(trees), [rng.randrange(40) for _ in range(rng.randint(0, 6))]
            script.append(("add", tree[: rng.randint(1, 24)] + own, options, rng.random() < 0.1))
        elif kind == "again":
            script.append(("again", rng.randrange(200), rng.randint(0, 5), options))
        elif kind in ("keep", "release"):
            script.append((kind, rng.randrange(100)))
        elif kind == "abort":
            script.append(("abort", rng.randrange(100) if rng.random() < 0.3 else 0))
        else:
            script.append((kind, rng.randint(1, 8)) if kind == "step" else (kind,))
    replay(h, script)
    finish(h)


@pytest.mark.parametrize("seed", range(30))
def test_a_restart_from_an_image_is_cold_too(seed: int) -> None:
    """What was cached is written down, read by a new engine with as much or less room, and used."""
    rng = random.Random(seed)
    num_blocks = rng.choice([0, 24, 60])
    limits = {
        "num_blocks": num_blocks,
        "block_size": 2,
        "max_num_seqs": 3,
        "max_num_batched_tokens": rng.choice([5, 64]),
        "max_model_len": 40,
        "seed": seed,
        "depth": seed % 3,
        "num_snapshots": rng.choice([None, 3, 12]) if num_blocks else 4,
        "host": (200, 40),
        "slow": 1,
    }
    trees = [[rng.randrange(40) for _ in range(24)] for _ in range(3)]

    def ask(h: Harness) -> int:
        for i in range(12):
            own = [rng.randrange(40) for _ in range(rng.randint(0, 4))]
            prompt = rng.choice(trees)[: rng.randint(8, 24)] + own
            h.add(f"r{i}", prompt, max_tokens=6, ignore_eos=True, seed=0, cache_salt=rng.choice(["", "", "s"]))
            for _ in range(rng.randint(0, 6)):
                h.step()
        finish(h)
        return h.scheduler.stats().prefix_hits

    more = (rng.choice([1, 2]), 5, None)
    first = harness(limits, more)
    ask(first)
    tree = first.scheduler.cache.tree
    assert isinstance(tree, TieredTree)
    found, sources = image.take(tree, rng.choice([5, 200]), rng.choice([2, 40]))
    count = len(sources.blocks) if num_blocks else None
    read = image.decode(image.encode(found), 2, count, len(sources.snapshots))
    room = rng.choice([(200, 40), (4, 3)])
    second = harness({**limits, "host": room}, more)
    device, old = second.device, first.device
    for place, source in enumerate(sources.blocks[: room[0]], start=1):
        there = [old.pages[-source, i] for i in range(2)] if source < 0 else old.host_pages[source]
        device.host_pages[place] = there
    for place, source in enumerate(sources.snapshots[: room[1]], start=1):
        device.host_states[place] = old.snapshots[-source] if source < 0 else old.host_states[source]
    new = second.scheduler.cache.tree
    assert isinstance(new, TieredTree)
    assert image.restore(new, read) == (min(len(read.keys), room[0]) if num_blocks else len(read.keys))
    check_invariants(second)
    assert ask(second) > 0 or room[0] == 4 or not read.keys
