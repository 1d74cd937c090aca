"""Budgets of reasoning in the offline API: over ranks, and through preemptions."""

from __future__ import annotations

from typing import Any

import pytest

from thalweg import LLM, SamplingParams, ThinkingLimit
from thalweg.config.model_source import model_folder
from thalweg.errors import InvalidRequest

QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now?"
BUDGETS = (0, 3, 7, None, 12, 30)

pytestmark = pytest.mark.skipif(
    not (model_folder(None) / "model.safetensors").exists(), reason="the bundled model has no weights in this checkout"
)


def answers(preempted: bool = False, **options: Any) -> tuple[list[list[int]], int]:
    """What follows an answer that was begun within reasoning, by BUDGETS; and the id of the closing mark."""
    with LLM(device="cpu", **options) as llm:
        assert llm.tokenizer is not None
        begin, end = (llm.tokenizer.added_tokens[mark] for mark in ("<think>", "</think>"))
        ids = [*llm.codec.chat_ids([{"role": "user", "content": QUESTION}]), begin]
        limits = [None if most is None else ThinkingLimit(begin, end, most, begun=True) for most in BUDGETS]
        params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, thinking=limit) for limit in limits]
        with pytest.raises(InvalidRequest, match="thinking names token id"):
            llm.generate([ids], SamplingParams(thinking=ThinkingLimit(begin, 1 << 20, 3)))
        outputs = llm.generate([ids] * len(params), params)
        assert (llm.engine.core.stats().num_preemptions > 0) == preempted
        return [out.outputs[0].token_ids for out in outputs], end


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    found, end = answers()
    for most, tokens in zip(BUDGETS, found, strict=True):
        if most is not None:
            assert tokens.index(end) == most
    assert found[3][:7] == found[2][:7]  # until its budget is spent, a request is as if it had none
    return found


def test_a_preempted_request_keeps_its_budget(expected: list[list[int]]) -> None:
    """There are blocks for fewer than three of six sequences at their end."""
    memory = (7 * 292 + 25 * 5) << 10  # slots of state and blocks of 8 tokens
    options: dict[str, Any] = {"max_num_seqs": 6, "block_size": 8, "max_num_batched_tokens": 32}
    assert answers(True, cache_memory=memory, enable_prefix_caching=False, **options)[0] == expected


@pytest.mark.slow
def test_ranks_give_the_same(expected: list[list[int]]) -> None:
    assert answers(tensor_parallel_size=2)[0] == expected
