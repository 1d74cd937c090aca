"""Recorded decode steps where sequences come, go and come back: what an eager engine says, whatever happened before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest

from tests.ops.cpp_case import needs_cpp
from thalweg import LLM, Grammar, SamplingParams
from thalweg.ops.toolchain.cpu_recording import Recording
from thalweg.runner.recorded import MAX_ROWS, RecordedSteps

pytestmark = needs_cpp

Answers = list[list[int]]
GREEDY = {"temperature": 0, "ignore_eos": True}
PROMPTS = [[(3 * i + j * j) % 1000 + 5 for j in range(3 + 11 * i)] for i in range(6)]
REGEX = Grammar("regex", "[a-z]{4,30}!")
MIXED = [
    SamplingParams(max_tokens=30, temperature=0, grammar=REGEX),
    SamplingParams(max_tokens=12, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=40, **GREEDY),
    SamplingParams(max_tokens=25, seed=2, top_p=0.9, top_k=40, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=33, seed=4, frequency_penalty=1.0, ignore_eos=True),
    SamplingParams(max_tokens=3, **GREEDY),
]


def tokens(llm: LLM, prompts: list[list[int]], params: list[SamplingParams] | SamplingParams) -> Answers:
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params)]


def batches_that_change(llm: LLM) -> Answers:
    """Sizes grow and shrink, and the parameters of a slot differ from one batch to the next."""
    found = []
    for n in (1, 4, 2, 6, 1, 3):
        found += tokens(llm, PROMPTS[:n], MIXED[-n:])
    return found


def preempted(llm: LLM) -> Answers:
    found = tokens(llm, PROMPTS, [SamplingParams(max_tokens=70, **GREEDY)] * 6)
    assert llm.engine.core.stats().num_preemptions > 0
    return found


def prefix_hits(llm: LLM) -> Answers:
    text = [(7 * j) % 900 + 5 for j in range(200)]
    longer = tokens(llm, [text], SamplingParams(max_tokens=40, **GREEDY))
    return [*longer, *tokens(llm, [text + longer[0], text, text[:150]], SamplingParams(max_tokens=20, **GREEDY))]


def sessions(llm: LLM) -> Answers:
    first = llm.session("a", PROMPTS[4])
    found = [first.generate([9, 8], SamplingParams(max_tokens=10, **GREEDY)).outputs[0].token_ids]
    for branch in llm.fork("a", ["b", "c"]):
        found.append(branch.generate([len(found) + 20], SamplingParams(max_tokens=9, **GREEDY)).outputs[0].token_ids)
    return found


def left_early(llm: LLM) -> Answers:
    """Callers that leave in the middle of an answer, whose slots and blocks others get."""
    found = []
    for i in range(4):
        stream = llm.stream(PROMPTS[i], SamplingParams(max_tokens=60, **GREEDY))
        found.append([token for _, delta in zip(range(3 + i), stream, strict=False) for token in delta.token_ids])
        stream.close()  # type: ignore[attr-defined]
        found += tokens(llm, PROMPTS[i : i + 2], SamplingParams(max_tokens=15 + i, **GREEDY))
    return found


def memory_for(sequences: int, blocks: int) -> int:
    with LLM(max_num_seqs=sequences, block_size=8) as llm:
        return (sequences + 1) * llm.info.bytes_per_sequence + blocks * 8 * llm.info.bytes_per_token


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        (batches_that_change, {"max_num_seqs": 6}),
        (batches_that_change, {"max_num_seqs": 3, "max_num_batched_tokens": 7}),
        (preempted, {"max_num_seqs": 6, "max_model_len": 160, "enable_prefix_caching": False}),
        (prefix_hits, {"max_num_seqs": 4}),
        (sessions, {"max_num_seqs": 2}),
        (left_early, {"max_num_seqs": 3}),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_answers_are_those_of_an_eager_engine(
    scenario: Callable[[LLM], Answers], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[int] = []
    replay = Recording.replay
    monkeypatch.setattr(Recording, "replay", lambda self: (replays.append(id(self)), replay(self)))
    if scenario is preempted:
        options = {**options, "cache_memory": memory_for(6, 40)}
    answers = []
    for eager in (True, False):
        with LLM(block_size=8, enforce_eager=eager, **options) as llm:
            answers.append(scenario(llm))
        assert bool(replays) != eager
    assert answers[0] == answers[1]


def test_engines_of_one_process_have_recordings_of_their_own() -> None:
    params = [SamplingParams(max_tokens=20 + i, **GREEDY) for i in range(3)]
    with LLM(enforce_eager=True, max_num_seqs=3) as llm:
        expected = tokens(llm, PROMPTS[:3], params)
    found: dict[int, Answers] = {}
    with LLM(max_num_seqs=3) as a, LLM(max_num_seqs=3, block_size=8) as b:
        both = (a, b)
        assert {llm.info.decode_steps.split(" up to ")[0] for llm in both} == {"recorded calls of"}

        def run(i: int) -> None:
            found[i] = [answer for _ in range(4) for answer in tokens(both[i], PROMPTS[:3], params)]

        threads = [Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {0: 4 * expected, 1: 4 * expected}


def test_there_are_as_many_recordings_as_sizes_and_they_go_with_the_engine() -> None:
    def alive() -> list[RecordedSteps]:
        gc.collect()
        return [x for x in gc.get_objects() if type(x) is RecordedSteps]

    before = len(alive())
    params = [SamplingParams(max_tokens=2 + i, **GREEDY) for i in range(MAX_ROWS + 3)]
    with LLM(max_num_seqs=MAX_ROWS + 3) as llm:
        for _ in range(2):
            tokens(llm, [[5, 6, 7 + i] for i in range(len(params))], params)
        recorded = alive()[-1]
        assert sorted(recorded._steps) == list(range(1, MAX_ROWS + 1))
        size = len(recorded.scratch)
        assert size < 32 << 20
        tokens(llm, [[5, 6, 7 + i] for i in range(len(params))], params)
        assert len(recorded.scratch) == size
        del recorded
    del llm
    assert len(alive()) == before
