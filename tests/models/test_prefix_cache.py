"""Models with the prefix cache on give a cold run's tokens, whatever was cached."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg import LLM, SamplingParams
from thalweg.cache.storage import CacheStorage
from thalweg.core import StepPlan
from thalweg.ops.delta.kda_mixer import reference as kda_mixer
from thalweg.runner.step import ModelRunner
from thalweg.text.results import RequestOutput

GDN = Path(__file__).resolve().parents[2] / "models" / "thalweg-tiny-gdn"
MODELS = ["kimi_linear", "tiny_gdn", "kimi_k2"]
WITH_STATES = MODELS[:2]
VOCAB = 500
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(max_tokens=12, temperature=1, seed=7, ignore_eos=True)


def model_of(name: str, shared_dir: Path) -> str | None:
    return {"kimi_linear": None, "tiny_gdn": str(GDN), "kimi_k2": str(shared_dir / "oracles" / "kimi_k2")}[name]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str | None:
    if request.param != "kimi_k2":
        return model_of(request.param, Path())
    return model_of(request.param, request.getfixturevalue("shared_dir"))


@pytest.fixture(params=WITH_STATES)
def with_states(request: pytest.FixtureRequest) -> str | None:
    return model_of(request.param, Path())


@pytest.fixture(autouse=True)
def nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Snapshots, blocks and states begin as NaN, so that what is read before it is written shows."""
    make = CacheStorage.__init__

    def poisoned(self: CacheStorage, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        for layer in self.layers:
            for tensor in layer.values():
                tensor[1:].fill_(float("nan"))

    monkeypatch.setattr(CacheStorage, "__init__", poisoned)
    return


def engine(model: str | None, on: bool = True, **options: Any) -> LLM:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "cache_memory": 64 << 20, "dtype": "float32"}
    return LLM(model, **{**defaults, **options}, enable_prefix_caching=on)


def ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(n)]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def one_by_one(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[RequestOutput]:
    return [llm.generate([prompt], params)[0] for prompt in prompts]


def conversation(llm: LLM) -> list[list[int]]:
    """Prompts that share: one, the same, a branch, another branch, and a second and third turn."""
    base = ids(150)
    prompts = [base, base, base[:140] + ids(30, 1), base[:140] + ids(40, 2)]
    for turn in range(2):
        said = llm.generate([prompts[-1]], SamplingParams(max_tokens=70, temperature=0, ignore_eos=True))[0]
        prompts.append(prompts[-1] + said.outputs[0].token_ids + ids(9, 10 + turn))
    return prompts


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_warm_partly_warm_chunked_and_batched_are_cold(model: str | None, params: SamplingParams) -> None:
    with engine(model, on=False) as llm:
        prompts = conversation(llm)
        cold = tokens(one_by_one(llm, prompts, params))
    for options in ({}, {"max_num_batched_tokens": 100, "block_size": 16}):
        with engine(model, **options) as llm:
            first = one_by_one(llm, prompts, params)
            assert tokens(first) == cold
            assert [o.num_cached_tokens > 0 for o in first] == [False, *[True] * 5]
            again = one_by_one(llm, prompts, params)
            assert tokens(again) == cold
            grid = 64 if llm.info.num_snapshots else llm.info.block_size
            assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // grid * grid for p in prompts]
            assert tokens(llm.generate(prompts, params)) == cold
        with engine(model, **options) as llm:
            assert tokens(llm.generate(prompts, params)) == cold


def test_answers_grow_beside_hits(model: str | None) -> None:
    """A snapshot's own sequence goes on, others begin from it, and all are cold's tokens."""
    long = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    prompts = [ids(130) + ids(n, 5) for n in (1, 40, 64, 65)]
    with engine(model, on=False) as llm:
        cold = tokens(one_by_one(llm, prompts, long))
    with engine(model) as llm:
        assert tokens(llm.generate(prompts, long)) == cold
        hits = llm.generate(prompts, long)
        assert tokens(hits) == cold
        assert all(o.num_cached_tokens >= 128 for o in hits)


def test_preempted_sequences_go_on_from_their_prefix(model: str | None) -> None:
    long = SamplingParams(max_tokens=70, temperature=0, ignore_eos=True)
    prompts = [ids(130) + ids(20 * n, n) for n in range(1, 5)]
    with engine(model, on=False) as llm:
        cold = tokens(one_by_one(llm, prompts, long))
        block, states = llm.info.bytes_per_token * 64, llm.info.bytes_per_sequence
    memory = 7 * states + max(9 * block - states, 0)  # blocks of two sequences, of four, and one or two snapshots
    with engine(model, cache_memory=memory, max_model_len=320) as llm:
        assert llm.info.keeps_prefixes
        assert 8 <= llm.info.num_blocks <= 9
        assert tokens(llm.generate(prompts, long)) == cold
        stats = llm.engine.core.stats()
        assert stats.num_preemptions > 0
        assert stats.blocks_used == 0


@pytest.mark.parametrize("tail", [1, 2, 63, 64, 65])
def test_a_tail_of_any_length_has_the_cold_runs_logits(model: str | None, tail: int) -> None:
    prefix, end = ids(128), ids(tail, 3)
    with engine(model, on=False) as llm:
        (cold,) = llm.generate([prefix + end], GREEDY)
    with engine(model) as llm:
        llm.generate([[*prefix, 9]], GREEDY)
        (warm,) = llm.generate([prefix + end], GREEDY)
        assert warm.num_cached_tokens == 128
    assert tokens([warm]) == tokens([cold])
    for a, b in zip(warm.outputs[0].logprobs or [], cold.outputs[0].logprobs or [], strict=True):
        torch.testing.assert_close(torch.tensor(a.top_logprobs), torch.tensor(b.top_logprobs), atol=2e-4, rtol=0)


@pytest.mark.parametrize("length", [64, 128, 192])
def test_a_prompt_of_whole_blocks_hits_all_but_the_last(model: str | None, length: int) -> None:
    with engine(model) as llm:
        first, second = one_by_one(llm, [ids(length)] * 2)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, length - 64)
    assert tokens([first]) == tokens([second])


@pytest.mark.parametrize(("block_size", "hit"), [(127, 254), (96, 192), (7, 280)])
def test_blocks_whose_ends_are_no_ends_of_chunks(with_states: str | None, block_size: int, hit: int) -> None:
    prompt = ids(290)
    with engine(with_states, on=False) as llm:
        cold = tokens(llm.generate([prompt], GREEDY))
    with engine(with_states, block_size=block_size) as llm:
        first, second = one_by_one(llm, [prompt] * 2)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, hit)
    assert tokens([first]) == tokens([second]) == cold


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_hits_are_alike_to_the_bit_and_a_cold_run_but_for_rounding(
    with_states: str | None, dtype: str, close: float
) -> None:
    """States in a snapshot are a cold run's to the bit; what is left of the prompt is then computed in fewer rows at
    once, whose sums the same matrices may round otherwise."""
    prompts = [ids(n) for n in (65, 128, 150, 300)]
    with engine(with_states, dtype=dtype) as llm:
        cold, warm, again = (one_by_one(llm, prompts) for _ in range(3))
    assert all(o.num_cached_tokens for o in warm)
    for a, b, c in zip(cold, warm, again, strict=True):
        assert b.outputs[0].logprobs == c.outputs[0].logprobs
        first, second = (x.outputs[0].logprobs[0] for x in (a, b))  # type: ignore[index]
        torch.testing.assert_close(torch.tensor(second.logprob), torch.tensor(first.logprob), atol=close, rtol=0)


def test_samples_of_one_prompt_are_one_prefill(model: str | None) -> None:
    prompt = ids(200)
    params = [SamplingParams(max_tokens=20, seed=seed, ignore_eos=True) for seed in range(4)]
    with engine(model, on=False) as llm:
        cold = tokens(llm.generate([prompt] * 4, params))
    with engine(model) as llm:
        outputs = llm.generate([prompt] * 4, params)
        assert tokens(outputs) == cold
        assert [o.num_cached_tokens for o in outputs] == [0, 192, 192, 192]
    assert len(set(map(tuple, cold))) == 4


def test_other_salts_share_nothing(with_states: str | None) -> None:
    prompt = ids(100)
    with engine(with_states) as llm:
        salts = ["", "a", "a", "b", ""]
        params = [SamplingParams(max_tokens=2, temperature=0, cache_salt=salt) for salt in salts]
        found = [llm.generate([prompt], p)[0].num_cached_tokens for p in params]
    assert found == [0, 0, 64, 0, 64]


def test_logprobs_of_a_cached_prompt_are_all_there(with_states: str | None) -> None:
    prompt = ids(100)
    asked = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1)
    with engine(with_states) as llm:
        (cold,) = llm.generate([prompt], asked)
        (warm,) = llm.generate([prompt], asked)
        logits = llm.prompt_logits(prompt)
    assert warm.num_cached_tokens == 0
    assert warm.prompt_logprobs == cold.prompt_logprobs
    assert len(warm.prompt_logprobs or []) == len(logits) == 100


class _Count(TorchDispatchMode):
    """Calls of torch's operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_steps_in_which_nothing_is_shared_launch_what_they_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the ops that write states at boundaries, which have them at hand in a kernel, and not in plain torch."""
    monkeypatch.setattr(kda_mixer, "kda_mixer_prefill", lambda proj, up, **_: torch.zeros_like(up[:, 0]))
    launch = ModelRunner.launch
    counts: list[tuple[bool, bool, int]] = []

    def counted(self: ModelRunner, plan: StepPlan) -> Any:
        with _Count() as counter:
            finish = launch(self, plan)
        counts.append((bool(plan.prefills), bool(plan.boundaries), counter.count - 6 * len(plan.snapshots)))
        return finish

    monkeypatch.setattr(ModelRunner, "launch", counted)
    found = []
    for on in (False, True):
        with engine(None, on=on) as llm:
            llm.generate([ids(200)], SamplingParams(max_tokens=70, temperature=0, ignore_eos=True))
        assert counts[0][:2] == (True, on)
        found.append([(prefill, count) for prefill, _, count in counts])
        counts.clear()
    assert found[0] == found[1]


def small_with_host_memory(llm: LLM, **options: Any) -> LLM:
    """An engine like `llm` whose device has room for about two prompts of 200 tokens, and host memory for all."""
    block, states = llm.info.bytes_per_token * llm.info.block_size, llm.info.bytes_per_sequence
    return engine(
        llm.config.model,
        max_num_seqs=2,
        max_model_len=384,
        cache_memory=(2 + 1 + 3) * states + 600 // llm.info.block_size * block,
        cpu_cache_memory=100 * (block + states),
        **options,
    )


@pytest.mark.parametrize("block_size", [64, 16])
def test_what_comes_back_from_host_memory_is_cold(model: str | None, block_size: int) -> None:
    others = [ids(200 + i, 20 + i) for i in range(4)]
    with engine(model, on=False, block_size=block_size) as llm:
        prompts = conversation(llm)
        cold = tokens(one_by_one(llm, prompts + others))
        small = small_with_host_memory(llm, block_size=block_size)
    with small as llm:
        assert "for what falls out of the device's cache" in "".join(llm.info.memory_split)
        assert tokens(one_by_one(llm, prompts + others)) == cold
        again = one_by_one(llm, prompts + others)
        assert tokens(again) == cold
        assert all(o.num_cached_tokens >= 128 for o in again)
        stats = llm.engine.core.stats()
        assert stats.prefix_host_hits >= 128 * len(others)
        assert min(stats.host_copies["blocks_saved"], stats.host_copies["blocks_fetched"]) > 0
        assert tokens(llm.generate(prompts + others, GREEDY)) == cold


@pytest.mark.parametrize(("snapshot_dtype", "close", "smaller"), [("bfloat16", 0.15, 1.7), ("int8", 0.4, 2.7)])
def test_smaller_snapshots_go_on_near_a_cold_run(
    with_states: str | None, snapshot_dtype: str, close: float, smaller: float
) -> None:
    prompts = [ids(n) for n in (65, 130, 200, 300)]
    with engine(with_states, on=False) as llm:
        cold, states = one_by_one(llm, prompts), llm.info.bytes_per_sequence
    with engine(with_states, snapshot_dtype=snapshot_dtype) as llm:
        one_by_one(llm, prompts)
        warm = one_by_one(llm, prompts)
        assert states / llm.info.bytes_per_snapshot > smaller
        assert llm.info.num_snapshots > 32  # what there is at most of those of full size
        assert f"snapshots of states x {llm.info.bytes_per_snapshot / 1024:.2f} KiB in {snapshot_dtype}" in "".join(
            llm.info.memory_split
        )
    assert all(o.num_cached_tokens for o in warm)
    for a, b in zip(cold, warm, strict=True):
        first, second = (x.outputs[0].logprobs[0] for x in (a, b))  # type: ignore[index]
        torch.testing.assert_close(torch.tensor(second.logprob), torch.tensor(first.logprob), atol=close, rtol=0)
    memory = (2 + 1 + 2 * (8 + 1)) * states  # of which two or three snapshots
    small = {"cache_memory": memory, "max_num_seqs": 2, "max_model_len": 384, "cpu_cache_memory": 32 << 20}
    with engine(with_states, snapshot_dtype=snapshot_dtype, **small) as llm:
        one_by_one(llm, prompts)
        again = one_by_one(llm, prompts)
        assert llm.engine.core.stats().host_copies["snapshots_fetched"] > 0
    for a, b in zip(again, warm, strict=True):
        assert (a.num_cached_tokens, a.outputs[0].logprobs) == (b.num_cached_tokens, b.outputs[0].logprobs)


def test_a_step_packs_as_many_snapshots_as_it_has_room_for() -> None:
    """What further prompts of the step leave is no snapshot, and no error."""
    with engine(None, on=False, max_num_seqs=16, max_num_batched_tokens=2048) as llm:
        cold = tokens(llm.generate([ids(70, i) for i in range(16)], GREEDY))
    with engine(None, max_num_seqs=16, max_num_batched_tokens=2048, snapshot_dtype="int8") as llm:
        prompts = [ids(70, i) for i in range(16)]
        assert tokens(llm.generate(prompts, GREEDY)) == cold
        again = llm.generate(prompts, GREEDY)
        assert sum(o.num_cached_tokens > 0 for o in again) == llm.info.num_staged == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_ranks_share_host_memory(name: str, shared_dir: Path) -> None:
    others = [ids(200 + i, 20 + i) for i in range(4)]
    with engine(model_of(name, shared_dir), on=False) as llm:
        prompts = conversation(llm) + others
        cold = tokens(one_by_one(llm, prompts))
        small = small_with_host_memory(llm, tensor_parallel_size=2)
    with small as llm:
        for _ in range(2):
            assert tokens(one_by_one(llm, prompts)) == cold
        assert llm.engine.core.stats().prefix_host_hits > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_ranks_share_the_same_prefixes(name: str, shared_dir: Path) -> None:
    model = model_of(name, shared_dir)
    with engine(model, on=False) as llm:
        prompts = conversation(llm)
        cold = tokens(one_by_one(llm, prompts))
    with engine(model, tensor_parallel_size=2) as llm:
        assert tokens(one_by_one(llm, prompts)) == cold
        again = llm.generate(prompts, GREEDY)
        assert tokens(again) == cold
        assert all(o.num_cached_tokens for o in again)


def share_of_hits(model: str | None, room: float, host: float) -> float:
    """Of six conversations of three turns that take turns at random, in tokens. `room` is what the device holds of what
    they have at their end, blocks and a snapshot each, `host` what host memory does."""
    conversations, turns, blocks_each = 6, 3, 7
    with engine(model, on=False) as llm:
        block, states = llm.info.bytes_per_token * 64, llm.info.bytes_per_sequence
    half = max(int(room * conversations) * states, int(room * conversations * blocks_each) * block)
    places = int(host * conversations * 2 * max(blocks_each * block, states))
    memory = (4 + 1) * states + 2 * half + block
    rng = random.Random(1)
    known = found = 0
    with engine(model, max_model_len=448, cache_memory=memory, cpu_cache_memory=places or None) as llm:
        prompts = [ids(200, i) for i in range(conversations)]
        for i in rng.sample(list(range(conversations)) * turns, turns * conversations):
            (said,) = llm.generate([prompts[i]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
            if len(prompts[i]) > 200:
                known += (len(prompts[i]) - 63) // 64 * 64  # what was computed, as far as it is on the grid
                found += min(said.num_cached_tokens, (len(prompts[i]) - 63) // 64 * 64)
            prompts[i] = prompts[i] + said.outputs[0].token_ids + ids(62, rng.randrange(1 << 30))
    return found / known


@pytest.mark.parametrize("name", ["kimi_linear", pytest.param("tiny_gdn", marks=pytest.mark.slow)])
def test_conversations_that_need_twice_the_room_hit_as_host_memory_lets_them(name: str) -> None:
    model = model_of(name, Path())
    unbounded = share_of_hits(model, 4, 0)
    assert unbounded > 0.95
    without, with_host = share_of_hits(model, 0.5, 0), share_of_hits(model, 0.5, 1)
    assert 0.4 * unbounded < without < 0.95 * unbounded
    assert with_host > max(0.95 * unbounded, without)
