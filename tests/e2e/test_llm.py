"""The offline engine on a small random model: the same tokens however a request is run, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import random_checkpoint as random
from thalweg import LLM, SamplingParams
from thalweg.core import Request
from thalweg.errors import ConfigError, EngineDeadError, InvalidRequest, ThalwegError

VOCAB = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(vocab=VOCAB, context=300)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


@pytest.fixture(scope="module")
def solo(folder: Path) -> Iterator[LLM]:
    """One request at a time, whole prompts, more memory than it needs: what every other way of running is held to."""
    with LLM(str(folder), max_num_seqs=1, max_num_batched_tokens=512, block_size=16) as llm:
        yield llm


def prompt(length: int, seed: int) -> list[int]:
    return [(7 * seed + 13 * i * i + i) % VOCAB for i in range(length)]


requests = st.lists(
    st.tuples(
        st.integers(1, 90),  # prompt length
        st.integers(0, 40),  # prompt seed
        st.integers(1, 24),  # max_tokens
        st.sampled_from(
            [
                {"temperature": 0},
                {"seed": 5},
                {"seed": 6, "top_p": 0.8},
                {"seed": 7, "frequency_penalty": 1.0},
            ]
        ),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=requests,
    seqs=st.integers(1, 5),
    budget=st.sampled_from([1, 3, 16, 17, 64, 400]),
    block_size=st.sampled_from([1, 4, 16]),
    tokens_of_cache=st.integers(120, 400),
)
def test_same_tokens_batched_chunked_and_preempted(
    folder: Path, solo: LLM, batch: list, seqs: int, budget: int, block_size: int, tokens_of_cache: int
) -> None:
    prompts = [prompt(n, seed) for n, seed, _, _ in batch]
    params = [SamplingParams(max_tokens=m, ignore_eos=True, **options) for _, _, m, options in batch]
    expected = [solo.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
    spec = solo.info
    slots = (seqs + 1) * spec.bytes_per_sequence
    pages = (tokens_of_cache // block_size + 2) * block_size * spec.bytes_per_token
    with LLM(
        str(folder), max_num_seqs=seqs, max_num_batched_tokens=budget, block_size=block_size,
        max_model_len=120, cache_memory=slots + pages,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, params)
        assert [o.outputs[0].token_ids for o in outputs] == expected
        stats = llm.engine.core.stats()
        assert (stats.blocks_used, stats.slots_used, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)


def test_preemption_happens_and_changes_nothing(folder: Path, solo: LLM) -> None:
    prompts = [prompt(40, s) for s in range(4)]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    expected = [solo.generate(p, params)[0].outputs[0].token_ids for p in prompts]
    memory = 5 * solo.info.bytes_per_sequence + 14 * 16 * solo.info.bytes_per_token
    with LLM(str(folder), max_num_seqs=4, block_size=16, max_model_len=120, cache_memory=memory) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == expected
        assert llm.engine.core.stats().num_preemptions > 0


def test_requests_join_and_leave_while_others_run(folder: Path, solo: LLM) -> None:
    with LLM(str(folder), max_num_seqs=3, max_num_batched_tokens=20, block_size=4) as llm:
        core = llm.engine.core
        asked = {f"r{i}": (prompt(5 + 11 * i, i), 4 + 3 * i) for i in range(6)}
        got: dict[str, list[int]] = {name: [] for name in asked}
        aborted = {"r2", "r4"}
        queue = list(asked)
        steps = 0
        while core.has_work() or queue:
            if steps % 3 == 0 and queue:
                name = queue.pop(0)
                ids, n = asked[name]
                core.add(
                    Request(
                        id=name,
                        prompt_token_ids=ids,
                        params=SamplingParams(max_tokens=n, temperature=0, ignore_eos=True),
                    )
                )
            if steps in (8, 14):
                core.abort("r2" if steps == 8 else "r4")
            for update in core.step():
                got[update.request_id] += update.token_ids
            steps += 1
        core.scheduler.check_idle()
        for name, (ids, n) in asked.items():
            full = (
                solo.generate(ids, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True))[0].outputs[0].token_ids
            )
            if name in aborted:
                assert got[name] == full[: len(got[name])]
            else:
                assert got[name] == full


def test_outputs_come_in_the_order_of_prompts(solo: LLM) -> None:
    prompts = [prompt(n, n) for n in (30, 2, 11)]
    outputs = solo.generate(prompts, [SamplingParams(max_tokens=m, ignore_eos=True) for m in (1, 9, 3)])
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 9, 3]
    assert all(o.finished for o in outputs)


def test_finish_reasons(solo: LLM) -> None:
    p = prompt(9, 1)
    free = solo.generate(p, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))[0].outputs[0].token_ids
    (out,) = solo.generate(p, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=(free[5],)))
    first = free.index(free[5])
    assert out.outputs[0].token_ids == free[: first + 1]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", free[5])
    (out,) = solo.generate(p, SamplingParams(max_tokens=0))
    assert (out.outputs[0].finish_reason, out.outputs[0].token_ids) == ("length", [])
    (out,) = solo.generate(prompt(290, 1), SamplingParams(max_tokens=None, ignore_eos=True))
    assert (out.outputs[0].finish_reason, len(out.outputs[0].token_ids)) == ("length", 10)


def test_logprobs_agree_with_prompt_logits(solo: LLM) -> None:
    import torch

    p = prompt(12, 4)
    (out,) = solo.generate(
        p, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    )
    ids = p + out.outputs[0].token_ids
    truth = torch.log_softmax(solo.prompt_logits(ids), -1)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    entries = [*out.prompt_logprobs[1:], *(out.outputs[0].logprobs or [])]
    assert [e.token_id for e in entries] == ids[1:]
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(truth[position, entry.token_id]), abs=1e-4)
    assert out.outputs[0].cumulative_logprob == pytest.approx(sum(e.logprob for e in entries[len(p) - 1 :]))


def test_calls_that_overlap_keep_their_own_tokens(solo: LLM, folder: Path) -> None:
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    prompts = [prompt(7 + i, i) for i in range(6)]
    expected = [solo.generate(p, params)[0].outputs[0].token_ids for p in prompts]
    with LLM(str(folder), max_num_seqs=3) as llm:
        streams = [llm.stream(p, params) for p in prompts[:2]]
        got: list[list[int]] = [[], []]
        for step in range(30):
            for stream, ids in zip(streams, got, strict=True):
                ids += next(stream).token_ids
            if step == 4:
                assert llm.generate(prompts[2], params)[0].outputs[0].token_ids == expected[2]
                llm.prompt_logits(prompts[3])
        assert got == expected[:2]
        for stream in streams:
            stream.close()
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda p: llm.generate(p, params)[0].outputs[0].token_ids, prompts))
        assert results == expected
        llm.engine.core.scheduler.check_idle()


def test_leaving_a_stream_early_frees_everything(solo: LLM) -> None:
    for i, delta in enumerate(solo.stream(prompt(20, 2), SamplingParams(max_tokens=50, ignore_eos=True))):
        assert delta.token_ids
        if i == 3:
            break
    assert not solo.engine.core.has_work()
    solo.engine.core.scheduler.check_idle()


def test_prompt_logits_leave_the_engine_as_it_was(solo: LLM) -> None:
    import torch

    first = solo.prompt_logits(prompt(33, 5))
    solo.generate(prompt(50, 6), SamplingParams(max_tokens=4))
    assert torch.equal(first, solo.prompt_logits(prompt(33, 5)))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([VOCAB], "vocabulary"),
        ([-1], "vocabulary"),
        ([[3, "x"]], "integer"),
        ([prompt(301, 0)], "--max-model-len"),
        ("text", "tokenizer"),
        ([3.5], "list of token ids"),
        ([[3.5]], "integer"),
        ({"prompt": "hi"}, "expected texts"),
        (b"hi", "expected texts"),
        (5, "expected texts"),
        (None, "expected texts"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(solo: LLM, bad: object, says: str) -> None:
    if bad == []:
        assert solo.generate([]) == []
        return
    with pytest.raises(InvalidRequest, match=says) as e:
        solo.generate(bad)  # type: ignore[arg-type]
    assert "\n" not in str(e.value)
    assert solo.generate(prompt(3, 1), SamplingParams(max_tokens=1))[0].finished  # nothing was harmed


def test_one_bad_prompt_refuses_the_call_before_anything_runs(solo: LLM) -> None:
    with pytest.raises(InvalidRequest):
        solo.generate([prompt(4, 1), prompt(301, 2)])
    assert not solo.engine.core.has_work()


def test_closed_llm_says_so(folder: Path) -> None:
    llm = LLM(str(folder))
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([1, 2])


def test_no_thread_outlives_the_engine(folder: Path) -> None:
    before = threading.active_count()
    with LLM(str(folder)):
        pass
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"device": "cuda:77"}, "--device"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"cache_memory": 1000}, "--max-num-seqs"),
        ({"max_model_len": 10_000}, "--max-model-len"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size"),
        ({"op_preference": {"kda_mixer_prefill": "magic"}}, "magic"),
        ({"op_preference": {"mla_rope": "reference"}}, "does not use"),
    ],
)
def test_an_engine_that_cannot_start_says_why(folder: Path, options: dict, says: str) -> None:
    with pytest.raises(ThalwegError, match=says) as e:
        LLM(**{"model": str(folder), **options})
    assert "\n" not in str(e.value)


def test_dummy_weights_are_deterministic_and_spread(folder: Path) -> None:
    outputs = []
    for seed in (0, 0, 1):
        with LLM(str(folder), load_format="dummy", seed=seed, max_num_seqs=2) as llm:
            outputs.append(
                llm.generate(prompt(20, 3), SamplingParams(max_tokens=20, temperature=0))[0].outputs[0].token_ids
            )
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
