"""Grammars in the offline engine: the same tokens however requests are run, and errors that are a request's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thalweg import LLM, Grammar, SamplingParams
from thalweg.errors import InvalidRequest
from thalweg.runner import step as step_module
from thalweg.sampling.structured import GrammarState, Masker, Masks

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "array", "items": {"enum": [1, 2]}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON, REGEX = Grammar("json_schema", json.dumps(SCHEMA)), Grammar("regex", "[a-z]{4,30}!")
PARAMS = [
    SamplingParams(max_tokens=60, seed=1, grammar=JSON),
    SamplingParams(max_tokens=20, temperature=0),
    SamplingParams(max_tokens=60, temperature=0, grammar=REGEX),
    SamplingParams(max_tokens=25, seed=2, top_p=0.9, ignore_eos=True),
    SamplingParams(max_tokens=60, seed=3, temperature=1.5, top_k=40, grammar=JSON, logprobs=2),
    SamplingParams(max_tokens=40, seed=4, frequency_penalty=1.0, grammar=REGEX, ignore_eos=True),
]
PROMPTS = [[(3 * i + j * j) % 260 for j in range(4 + 7 * i)] for i in range(len(PARAMS))]


@pytest.fixture(scope="module")
def solo(folder: Path) -> Iterator[list[list[int]]]:
    """One at a time, whole prompts: what every other way of running is held to."""
    with LLM(str(folder), max_num_seqs=1, max_num_batched_tokens=512) as llm:
        outputs = [llm.generate(p, s)[0].outputs[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
        for output, params in zip(outputs, PARAMS, strict=True):
            if params.grammar is JSON and output.finish_reason == "stop":
                assert list(json.loads(output.text)) == ["a", "b"]
            if params.grammar is REGEX:
                assert output.text.removesuffix("!").isalpha()
        yield [o.token_ids for o in outputs]


@pytest.mark.parametrize("options", [{"max_num_seqs": 6}, {"max_num_seqs": 3, "max_num_batched_tokens": 7}])
def test_batched_and_chunked(folder: Path, solo: list[list[int]], options: Any) -> None:
    with LLM(str(folder), block_size=8, **options) as llm:
        for _ in range(2):  # the second time the grammars are compiled already, and every slot was used
            assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == solo


def test_preempted_and_resumed(folder: Path, solo: list[list[int]]) -> None:
    with LLM(str(folder), max_num_seqs=6) as llm:
        memory = 7 * llm.info.bytes_per_sequence + 15 * 8 * llm.info.bytes_per_token
    with LLM(str(folder), max_num_seqs=6, block_size=8, max_model_len=110, cache_memory=memory) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == solo
        assert llm.engine.core.stats().num_preemptions > 0


def test_static_steps(folder: Path, solo: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    original = step_module.ModelRunner.__init__

    def with_static_steps(self: Any, *args: Any) -> None:
        original(self, *args[:4], graph_sizes=[1, 2, 4, 6])

    monkeypatch.setattr(step_module.ModelRunner, "__init__", with_static_steps)
    with LLM(str(folder), max_num_seqs=6, enforce_eager=True) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == solo


def test_without_grammars_there_are_no_masks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Masker, "masks", None)
    with LLM(str(folder), max_num_seqs=4) as llm:
        free = [p for p in PARAMS if p.grammar is None]
        assert len(llm.generate(PROMPTS[: len(free)], free)) == len(free)


def test_a_grammar_that_cannot_be_used_is_refused_before_anything_runs(folder: Path) -> None:
    with LLM(str(folder)) as llm:
        with pytest.raises(InvalidRequest, match="the grammar cannot be used"):
            llm.generate(PROMPTS[:2], [PARAMS[0], SamplingParams(grammar=Grammar("regex", "("))])
        assert llm.engine.core.stats().prompt_tokens == 0
        with pytest.raises(InvalidRequest, match="grammar is"):
            SamplingParams(grammar="a+")  # type: ignore[arg-type]


def test_a_matcher_that_fails_ends_its_request_alone(
    folder: Path, solo: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Masker.masks

    def failing(self: Masker, grammars: list[tuple[int, GrammarState]], *thinking: object) -> Masks | None:
        masks = original(self, grammars, *thinking)  # type: ignore[arg-type]
        if masks is not None and masks.rows and failing.calls > 4:  # type: ignore[attr-defined]
            masks.errors[masks.rows[0]] = "the grammar cannot go on: a test"
        failing.calls += 1  # type: ignore[attr-defined]
        return masks

    failing.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Masker, "masks", failing)
    with LLM(str(folder), max_num_seqs=6) as llm:
        outputs = llm.generate(PROMPTS[:2], PARAMS[:2])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[0].error == "the grammar cannot go on: a test"
    assert outputs[1].outputs[0].token_ids == solo[1]
