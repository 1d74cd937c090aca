"""Each architecture and published format against logits and tokens that Hugging Face transformers computed on the same
random checkpoint.

What was computed is stored; scripts/outside_logits.py computes it anew. The oracles beside a developer's checkout
(test_oracles.py) are larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.outside_cases import CASES, GREEDY, POSITIONS, STORED, write
from thalweg import LLM, SamplingParams

ATOL = 2e-4

Outside = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module", params=CASES)
def outside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    name = request.param
    folder, fingerprint = write(name, tmp_path_factory.mktemp(name) / name)
    with np.load(STORED, allow_pickle=False) as stored:
        same = fingerprint == pytest.approx(float(stored[f"{name}_fingerprint"]), rel=1e-6)
        assert same, "other weights were drawn than those that the logits are of"
        yield folder, {kind: stored[f"{name}_{kind}"] for kind in ("ids", "logits", "greedy")}


@pytest.mark.parametrize("chunk", [4096, 1, 7, 16])
def test_logits_of_every_position_in_chunks(outside: Outside, chunk: int) -> None:
    folder, expected = outside
    with LLM(str(folder), device="cpu", max_num_seqs=4, max_num_batched_tokens=chunk, block_size=16) as llm:
        for ids, logits in zip(expected["ids"], expected["logits"], strict=True):
            np.testing.assert_allclose(llm.prompt_logits(ids).numpy(), logits, atol=ATOL, rtol=0)


def test_greedy_tokens_among_other_requests(outside: Outside) -> None:
    folder, expected = outside
    prompts = [[5], *(ids[: POSITIONS // 2].tolist() for ids in expected["ids"]), [*range(3, 60)]]
    greedy = SamplingParams(max_tokens=GREEDY, temperature=0, ignore_eos=True)
    with LLM(str(folder), device="cpu", max_num_seqs=3, max_num_batched_tokens=24, block_size=8) as llm:
        outputs = llm.generate(prompts, greedy)
    assert [out.outputs[0].token_ids for out in outputs[1:3]] == expected["greedy"].tolist()
