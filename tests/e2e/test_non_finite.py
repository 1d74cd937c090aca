"""A request that makes the model overflow ends alone, and what it leaves in the cache reaches nobody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import random_checkpoint as random
from thalweg import LLM, SamplingParams

POISON = 7  # a token whose embedding is not finite
PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [[3 + i, 11 * i % 90 + 8, 5] * (2 + 5 * i) for i in range(4)]


@pytest.fixture(scope="module", params=[math.nan, math.inf])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    c = random.config()
    weights = random.weights(c)
    [name] = [name for name in weights if "embed" in name]
    weights[name][POISON] = request.param
    return random.write(tmp_path_factory.mktemp("model"), c, weights)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[list[list[int]]]:
    with LLM(str(folder), max_num_seqs=1) as llm:
        yield [llm.generate(p, PARAMS)[0].outputs[0].token_ids for p in PROMPTS]


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(max_tokens=5, top_p=0.5, logprobs=2)])
def test_one_overflows_and_the_others_keep_their_tokens(
    folder: Path, expected: list[list[int]], params: SamplingParams
) -> None:
    poisoned = [[5, 6, POISON, 9] * 8, [POISON]]
    prompts = [PROMPTS[0], poisoned[0], PROMPTS[1], PROMPTS[2], poisoned[1], PROMPTS[3]]
    all_params = [params if p in poisoned else PARAMS for p in prompts]
    # Few slots and blocks, so that the next ones get what the overflowed ones have written to.
    with LLM(str(folder), max_num_seqs=3, block_size=4, max_num_batched_tokens=16) as llm:
        for _ in range(3):
            outputs = llm.generate(prompts, all_params)
            for prompt, output in zip(prompts, outputs, strict=True):
                if prompt in poisoned:
                    assert output.outputs[0].finish_reason == "error"
                    assert "non-finite" in (output.error or "")
                else:
                    assert output.outputs[0].token_ids == expected[PROMPTS.index(prompt)]
