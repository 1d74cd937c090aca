"""Grammars and budgets of reasoning on a CUDA device, among rows without, with graphs and without."""

from __future__ import annotations

import json

import pytest

from thalweg import LLM, Grammar, SamplingParams, ThinkingLimit
from thalweg.config.model_source import model_folder

pytestmark = pytest.mark.gpu
pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now?"


@pytest.mark.parametrize("eager", [True, False])
def test_json_among_plain_rows(eager: bool) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    plain = SamplingParams(max_tokens=40, temperature=0)
    held = [SamplingParams(max_tokens=200, temperature=1.2, seed=i, grammar=grammar) for i in range(4)]
    with LLM(device="cuda", cache_memory=1 << 30, dtype="float32", max_num_seqs=8, enforce_eager=eager) as llm:
        expected = llm.generate(QUESTION, plain)[0].outputs[0].token_ids
        outputs = [o.outputs[0] for o in llm.generate([QUESTION] * 8, [p for h in held for p in (plain, h)])]
        stats = llm.engine.core.stats()
        assert (stats.blocks_used, stats.slots_used) == (0, 0)
    assert all(o.token_ids == expected for o in outputs[::2])
    for output in outputs[1::2]:
        assert output.finish_reason == "stop"
        assert list(json.loads(output.text)) == ["name", "n"]


@pytest.mark.parametrize("eager", [True, False])
def test_budgets_of_reasoning_among_plain_rows(eager: bool) -> None:
    """The closing mark comes when the budget is spent, and neither a neighbour's tokens nor the text before it move."""
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with LLM(device="cuda", cache_memory=1 << 30, dtype="float32", max_num_seqs=8, enforce_eager=eager) as llm:
        assert llm.tokenizer is not None
        begin, end = (llm.tokenizer.added_tokens[mark] for mark in ("<think>", "</think>"))
        ids = [*llm.codec.chat_ids([{"role": "user", "content": QUESTION}]), begin]
        budgets = (None, 0, 3, 7)
        limits = [None if most is None else ThinkingLimit(begin, end, most, begun=True) for most in budgets]
        params = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, thinking=limit) for limit in limits]
        expected = llm.generate([ids], params[0])[0].outputs[0].token_ids
        outputs = [o.outputs[0].token_ids for o in llm.generate([ids] * 4, params)]
    assert outputs[0] == expected
    for most, tokens in zip((0, 3, 7), outputs[1:], strict=True):
        assert tokens[: most + 1] == [*expected[:most], end]
