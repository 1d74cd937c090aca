"""The prefix cache on a CUDA device: kernels that write states on their way, copies beside graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.served import BF16_LOGPROB, FAMILIES
from tests.models.test_prefix_cache import GREEDY, conversation, ids, one_by_one, tokens
from thalweg import LLM, SamplingParams
from thalweg.cache.host_storage import HostStorage
from thalweg.cache.storage import CacheStorage
from thalweg.core import StepPlan

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["kimi_linear", "qwen3_5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param]().write(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def snapshots_begin_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    make = CacheStorage.__init__

    def poisoned(self: CacheStorage, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        for states in self.states:
            states[:, self.num_slots + 1 :] = torch.nan

    monkeypatch.setattr(CacheStorage, "__init__", poisoned)


def engine(folder: Path, dtype: str, on: bool) -> LLM:
    return LLM(
        str(folder),
        device="cuda",
        dtype=dtype,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        cache_memory=1 << 30,
        enable_prefix_caching=on,
    )


def test_hits_give_a_cold_runs_tokens_in_float32(folder: Path) -> None:
    long = SamplingParams(max_tokens=70, temperature=0, ignore_eos=True)
    with engine(folder, "float32", False) as llm:
        prompts = conversation(llm)
        cold = tokens(one_by_one(llm, prompts, long))
    with engine(folder, "float32", True) as llm:
        assert tokens(one_by_one(llm, prompts, long)) == cold
        again = one_by_one(llm, prompts, long)
        assert tokens(again) == cold
        assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // 64 * 64 for p in prompts]
        assert tokens(llm.generate(prompts, long)) == cold


def test_hits_in_bfloat16_are_alike_and_near_a_cold_run(folder: Path) -> None:
    prompts = [ids(n) for n in (65, 128, 150, 300)]
    with engine(folder, "bfloat16", True) as llm:
        assert llm.info.decode_steps.startswith("CUDA graphs"), llm.info.decode_steps
        cold, warm, again = (one_by_one(llm, prompts) for _ in range(3))
    assert all(o.num_cached_tokens for o in warm)
    differences = []
    for a, b, c in zip(cold, warm, again, strict=True):
        assert b.outputs[0].logprobs == c.outputs[0].logprobs
        first, second = (x.outputs[0].logprobs[0] for x in (a, b))  # type: ignore[index]
        differences.append(abs(first.logprob - second.logprob))
    assert max(differences) < 4 * BF16_LOGPROB


def test_answers_that_go_on_beside_hits(folder: Path) -> None:
    """In float32: a sequence decodes past its snapshots while others begin from them."""
    long = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
    prompts = [ids(130) + ids(n, 5) for n in (1, 40, 64, 65)]
    with engine(folder, "float32", False) as llm:
        cold = tokens(one_by_one(llm, prompts, long))
    with engine(folder, "float32", True) as llm:
        assert tokens(llm.generate(prompts, long)) == cold
        assert tokens(llm.generate(prompts, long)) == cold
        assert tokens(one_by_one(llm, prompts, GREEDY)) == [answer[:12] for answer in cold]


def test_no_step_with_snapshots_waits_for_the_device(folder: Path) -> None:
    with engine(folder, "bfloat16", True) as llm:
        prompts = [ids(130) + ids(n, 5) for n in (1, 40, 64, 65)] * 2
        params = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
        llm.generate(prompts, params)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = llm.generate([prompt + ids(30, 6) for prompt in prompts], params)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(o.num_cached_tokens for o in outputs)


@pytest.mark.parametrize("delayed", [False, True])
def test_what_comes_back_from_host_memory_is_cold(folder: Path, delayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`delayed`: copies begin late, so that a step which does not wait for them reads something else."""
    copy = HostStorage.copy

    def late(self: HostStorage, plan: StepPlan) -> None:
        if plan.host is not None and self._stream is not None:
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(20_000_000)
        copy(self, plan)

    if delayed:
        monkeypatch.setattr(HostStorage, "copy", late)
    long = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompts = [ids(200 + i, 20 + i) for i in range(8)]
    with engine(folder, "float32", False) as llm:
        cold = tokens(one_by_one(llm, prompts, long))
        block, states = llm.info.bytes_per_token * 64, llm.info.bytes_per_sequence
    with LLM(
        str(folder),
        device="cuda",
        dtype="float32",
        max_num_seqs=2,
        max_model_len=320,
        cache_memory=6 * states + 8 * block,
        cpu_cache_memory=100 * (block + states),
    ) as llm:
        for _ in range(2):
            assert tokens(one_by_one(llm, prompts, long)) == cold
        for _ in range(3):
            assert tokens(llm.generate(prompts, long)) == cold
        stats = llm.engine.core.stats()
        assert stats.prefix_host_hits >= 8 * 192


@pytest.mark.parametrize(("snapshot_dtype", "close"), [("bfloat16", 0.05), ("int8", 0.4)])
def test_smaller_snapshots_go_on_near_a_cold_run(folder: Path, snapshot_dtype: str, close: float) -> None:
    prompts = [ids(n) for n in (65, 130, 200, 300)]
    with engine(folder, "float32", False) as llm:
        cold = one_by_one(llm, prompts)
    options = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 512, "cache_memory": 1 << 30}
    with LLM(str(folder), device="cuda", enable_prefix_caching=True, snapshot_dtype=snapshot_dtype, **options) as llm:
        one_by_one(llm, prompts)
        warm = one_by_one(llm, prompts)
    assert all(o.num_cached_tokens for o in warm)
    for a, b in zip(cold, warm, strict=True):
        first, second = (x.outputs[0].logprobs[0] for x in (a, b))  # type: ignore[index]
        assert abs(first.logprob - second.logprob) < close
