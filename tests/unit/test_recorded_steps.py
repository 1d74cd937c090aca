"""Decode steps on a CPU that are recorded and replayed: the tokens of eager steps, and when steps are eager."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.profiler import profile

from tests.models import random_checkpoint as random
from tests.models import random_kimi_k2, random_qwen
from tests.ops.cpp_case import needs_cpp
from thalweg import LLM, SamplingParams
from thalweg.assembly import rank
from thalweg.assembly.inspect import describe
from thalweg.assembly.rank import build_rank
from thalweg.config.engine import EngineConfig
from thalweg.ops.registry import Choice
from thalweg.ops.toolchain.cpu_recording import Recording
from thalweg.runner.recorded import MAX_ROWS, RecordedSteps, most_bytes

pytestmark = needs_cpp


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(vocab=128, context=300, kda_dim=16)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


@pytest.fixture(name="replays")
def counted_replays(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each recording was replayed, by its identity."""
    counts: Counter[int] = Counter()
    replay = Recording.replay

    def counting(self: Recording) -> None:
        counts[id(self)] += 1
        replay(self)

    monkeypatch.setattr(Recording, "replay", counting)
    return counts


def generate(folder: Path, **options: Any) -> list[list[int]]:
    """Requests of every kind, joining and leaving."""
    params = [
        SamplingParams(max_tokens=n, ignore_eos=True, **chosen)
        for n, chosen in [
            (30, {"temperature": 0}),
            (5, {"seed": 1}),
            (17, {"seed": 2, "top_p": 0.8}),
            (22, {"temperature": 0, "presence_penalty": 1.0}),
            (40, {"seed": 3}),
            (9, {"temperature": 0, "logprobs": 1}),
        ]
    ]
    prompts = [[(3 * i + j * j) % 128 for j in range(4 + 9 * i)] for i in range(len(params))]
    with LLM(str(folder), max_num_seqs=5, max_num_batched_tokens=24, block_size=8, **options) as llm:
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_eager_steps(folder: Path, dtype: str, replays: Counter[int]) -> None:
    expected = generate(folder, dtype=dtype, enforce_eager=True)
    assert not replays
    assert generate(folder, dtype=dtype) == expected
    assert len(replays) > 2
    assert replays.total() > 20


@pytest.mark.parametrize("family", [random_qwen, random_kimi_k2], ids=["qwen", "kimi_k2"])
def test_every_family_is_recorded(family: ModuleType, tmp_path: Path, replays: Counter[int]) -> None:
    c = family.config()
    folder, answers = family.write(tmp_path, c, family.weights(c)), []
    for eager in (True, False):
        with LLM(str(folder), max_num_seqs=3, enforce_eager=eager) as llm:
            assert llm.info.decode_steps.startswith("eager" if eager else "recorded calls"), llm.info.decode_steps
            params = [SamplingParams(temperature=0, max_tokens=6 + 3 * i, ignore_eos=True) for i in range(3)]
            answers.append([o.outputs[0].token_ids for o in llm.generate([[3, 5, 7 + i] for i in range(3)], params)])
    assert answers[0] == answers[1]
    assert len(replays) == 3


def test_a_sequence_that_begins_where_the_last_one_in_its_slot_would_go_on_has_blocks_of_its_own(
    folder: Path, replays: Counter[int]
) -> None:
    answers = []
    for eager in (True, False):
        with LLM(str(folder), max_num_seqs=1, block_size=8, enforce_eager=eager, enable_prefix_caching=False) as llm:
            given = []
            for first, new in ((10, 4), (13, 3), (15, 30), (44, 9)):  # each prompt is as long as the last text, or more
                params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
                prompt = [(7 * first + j * j) % 128 for j in range(first)]
                given.append(llm.generate([prompt], params)[0].outputs[0].token_ids)
            answers.append(given)
    assert answers[0] == answers[1]
    assert replays.total() > 20


def test_more_rows_than_are_recorded_run_eagerly(folder: Path, replays: Counter[int]) -> None:
    params = [SamplingParams(temperature=0, max_tokens=4 + i // 8 * 4, ignore_eos=True) for i in range(MAX_ROWS + 4)]
    prompts = [[i, 127 - i, 5] for i in range(len(params))]
    answers = []
    for eager in (True, False):
        with LLM(str(folder), max_num_seqs=len(params), enforce_eager=eager) as llm:
            answers.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
            said = "eager: --enforce-eager" if eager else f"recorded calls of up to {MAX_ROWS} rows, eager beyond; "
            assert llm.info.decode_steps.startswith(said)
    assert answers[0] == answers[1]
    assert replays


@pytest.mark.parametrize("family", [random, random_qwen, random_kimi_k2], ids=["kimi_linear", "qwen", "kimi_k2"])
def test_steps_of_the_most_rows_take_less_than_the_cache_leaves_them(family: ModuleType, tmp_path: Path) -> None:
    c = family.config(kda_dim=16) if family is random else family.config()
    with LLM(str(family.write(tmp_path, c, family.weights(c)))) as llm:
        (steps,) = (each for each in gc.get_objects() if type(each) is RecordedSteps)
        for rows in (1, MAX_ROWS):
            llm.generate([[3, 5]] * rows, SamplingParams(max_tokens=3, ignore_eos=True))
        assert not steps.refused
        assert len(steps.scratch) < steps.scratch.limit


def test_steps_that_would_take_more_run_eagerly(
    folder: Path, replays: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "most_bytes", lambda *_: 1 << 14)
    with LLM(str(folder), max_num_seqs=16) as llm:
        few = llm.generate([[3, 5]], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        recorded = replays.total()
        assert recorded > 4
        many = llm.generate([[3, 5]] * 16, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        assert replays.total() == recorded
    assert {tuple(o.outputs[0].token_ids) for o in many} == {tuple(few[0].outputs[0].token_ids)}


def test_the_cache_is_what_recordings_leave_unless_its_size_was_given(folder: Path) -> None:
    def memory(**options: Any) -> int:
        found = describe(EngineConfig(str(folder), device="cpu", **options)).memory
        assert found is not None
        return found.memory_bytes

    recorded = most_bytes(10, 128, random.config()["hidden_size"])
    assert memory(max_num_seqs=10) == memory(max_num_seqs=10, enforce_eager=True) - recorded
    assert memory(cache_memory=1 << 24) == memory(cache_memory=1 << 24, enforce_eager=True) == 1 << 24


@pytest.fixture
def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in torch is not known from the names of the implementations."""
    monkeypatch.setattr(Choice, "why_not_recorded", lambda *_: None)


def test_a_model_with_an_op_in_torch_runs_eagerly_and_names_it(folder: Path, replays: Counter[int]) -> None:
    with LLM(str(folder), max_num_seqs=2, op_preference={"norm_swiglu": "reference"}) as llm:
        assert llm.info.decode_steps == "eager: op norm_swiglu is served by 'reference', which runs in torch"
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert not replays


@pytest.mark.usefixtures("unnoticed")
def test_a_step_in_which_torch_computes_is_noticed_while_it_is_recorded(folder: Path, replays: Counter[int]) -> None:
    with LLM(str(folder), max_num_seqs=2, op_preference={"norm_swiglu": "reference"}) as llm:
        assert llm.info.decode_steps.startswith("eager: torch runs ")
        assert llm.info.decode_steps.endswith(" between ops in C++")
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert not replays


@pytest.mark.usefixtures("unnoticed")
def test_a_rank_that_cannot_record_keeps_nothing_for_it(folder: Path) -> None:
    preference = {"norm_swiglu": "reference"}
    config = EngineConfig(model=str(folder), device="cpu", max_num_seqs=2, op_preference=preference)
    runner, info = build_rank(config, 0, "")
    assert info.decode_steps.startswith("eager: torch runs ")
    assert runner._recorded is None
    runner.close()


def test_an_engine_that_starts_while_a_profile_runs_records_steps_after_it(folder: Path, replays: Counter[int]) -> None:
    with profile():
        llm = LLM(str(folder), max_num_seqs=2)
    assert llm.info.decode_steps.startswith("recorded calls")
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert replays.total() > 4
    llm.close()


def test_a_profile_shows_ops_by_name(folder: Path, replays: Counter[int]) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(str(folder), max_num_seqs=2) as llm:
        expected = llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids
        before = replays.total()
        assert before > 4
        with profile():
            assert llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids == expected
        assert replays.total() == before
        llm.generate([[1, 2, 3]], params)
        assert replays.total() > before
