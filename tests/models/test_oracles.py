"""Whole models against logits and tokens that an outside implementation computed, however the tokens are fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from thalweg import LLM, SamplingParams

ATOL = 2e-4
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


FAMILIES = [
    *("kimi_linear", "kimi_k2", "kimi_k2_fp8", "kimi_k2_int4"),
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_fp8", "qwen3_5_moe_fp8"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, shared_dir: Path) -> Path:
    return shared_dir / "oracles" / request.param


@pytest.mark.parametrize("chunk", [4096, 1, 7, 16, 33, 64])
def test_oracle_logits_in_chunks(oracle: Path, chunk: int) -> None:
    ids, expected = np.load(oracle / "ids.npy"), np.load(oracle / "logits.npy")
    with LLM(str(oracle), max_num_seqs=4, max_num_batched_tokens=chunk, block_size=16) as llm:
        for row in range(2):
            got = llm.prompt_logits(ids[row])
            assert got.shape == expected[row].shape
            assert str(got.dtype) == "torch.float32"
            np.testing.assert_allclose(got.numpy(), expected[row], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("budget", "seqs", "block_size"), [(4096, 8, 64), (24, 8, 16), (5, 3, 1), (64, 2, 7)])
def test_oracle_greedy_among_others(oracle: Path, budget: int, seqs: int, block_size: int) -> None:
    greedy = np.load(oracle / "greedy.npy")
    others = [list(range(3, 3 + n)) for n in (1, 17, 64, 40)]
    prompts = [others[0], greedy[0, :20], others[1], others[2], greedy[1, :20].tolist(), others[3]]
    with LLM(str(oracle), max_num_seqs=seqs, max_num_batched_tokens=budget, block_size=block_size) as llm:
        outputs = llm.generate(prompts, GREEDY)
    for row, at in ((0, 1), (1, 4)):
        assert outputs[at].outputs[0].token_ids == greedy[row, 20:].tolist()
        assert outputs[at].outputs[0].finish_reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_same(oracle: Path, ranks: int) -> None:
    """Also where there are fewer key heads than ranks, which share them then."""
    ids, expected = np.load(oracle / "ids.npy"), np.load(oracle / "logits.npy")
    greedy = np.load(oracle / "greedy.npy")
    with LLM(str(oracle), max_num_seqs=4, tensor_parallel_size=ranks) as llm:
        np.testing.assert_allclose(llm.prompt_logits(ids[0]).numpy(), expected[0], atol=ATOL, rtol=0)
        outputs = llm.generate([row[:20].tolist() for row in greedy], GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == greedy[:, 20:].tolist()
