"""Kimi-Linear on other shapes than the oracle's, against a second implementation in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import naive_kimi_linear as naive
from tests.models import random_checkpoint as random
from thalweg import LLM, SamplingParams

ATOL = 2e-4
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


SHAPES = {
    "odd": dict(layers=7, full=(3, 7), hidden=72, kda_heads=3, kda_dim=32, heads=3, nope=20, rope=6, value=12, rank=24,
                experts=12, top_k=3, shared=2, inner=20, vocab=777),
    "all KDA, no shared expert": dict(layers=2, full=(), shared=0),
    "all MLA, all dense": dict(layers=2, full=(1, 2), dense=2),
    "one head, one expert a token": dict(layers=3, full=(2,), kda_heads=1, heads=1, top_k=1),
    "tied embeddings": dict(layers=2, full=(1,), tie_word_embeddings=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_against_float64(tmp_path: Path, name: str) -> None:
    c = random.config(**SHAPES[name])
    w = random.weights(c, seed=3)
    ids = np.random.default_rng(0).integers(0, c["vocab_size"], 61).tolist()
    expected = naive.logits(c, w, ids).numpy()
    folder = random.write(tmp_path / "model", c, w)
    for chunk in (4096, 13):
        with LLM(str(folder), max_num_seqs=2, max_num_batched_tokens=chunk, block_size=8) as llm:
            np.testing.assert_allclose(llm.prompt_logits(ids).numpy(), expected, atol=ATOL, rtol=0)


@pytest.mark.slow
def test_long_prompt_against_float64(tmp_path: Path) -> None:
    c = random.config(**SHAPES["odd"])
    w = random.weights(c, seed=4)
    ids = np.random.default_rng(1).integers(0, c["vocab_size"], 333).tolist()
    folder = random.write(tmp_path / "model", c, w)
    expected = naive.logits(c, w, ids).numpy()
    for chunk in (4096, 64, 50):
        with LLM(str(folder), max_num_seqs=2, max_num_batched_tokens=chunk, block_size=64) as llm:
            np.testing.assert_allclose(llm.prompt_logits(ids).numpy(), expected, atol=ATOL, rtol=0)


def test_forms_that_an_op_preference_asks_for_give_the_same(tmp_path: Path) -> None:
    forms = {"norm_linear": "separate", "batched_projection": "separate"}  # the projections as the checkpoint has them
    c = random.config()
    w = random.weights(c)
    folder = random.write(tmp_path / "model", c, w)
    ids = np.random.default_rng(2).integers(0, c["vocab_size"], 40).tolist()
    found = []
    for op_preference in ({}, forms):
        with LLM(str(folder), max_num_seqs=2, op_preference=op_preference) as llm:
            (output,) = llm.generate([ids], GREEDY)
            found.append((llm.prompt_logits(ids), output.outputs[0].token_ids, llm.info.ops))
    (logits, tokens, usual), (other_logits, other_tokens, ops) = found
    np.testing.assert_allclose(other_logits.numpy(), logits.numpy(), atol=1e-5, rtol=0)
    assert other_tokens == tokens

    def served_by(choices: Any) -> set[tuple[str, str]]:
        return {(choice.op, choice.table[0].implementation) for choice in choices}

    assert set(forms.items()) <= served_by(ops) - served_by(usual)
