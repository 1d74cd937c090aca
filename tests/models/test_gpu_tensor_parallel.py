"""Two CUDA devices give what one gives, over NCCL, for every family: whole graphs, prompts in chunks, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models.oracle_kl import divergences
from tests.models.served import BF16_KL, BF16_LOGPROB, FAMILIES, PARAMS, decode_against_prompts, prompts
from thalweg import LLM

pytestmark = pytest.mark.gpu

IDS = prompts(5)[4]


def written(folder: Path, name: str) -> Path:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, not {torch.cuda.device_count()}")
    return FAMILIES[name]().write(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), request.param)


def test_logits_and_tokens_in_float32(folder: Path) -> None:
    import torch

    results = []
    for size in (1, 2):
        with LLM(
            str(folder), device="cuda", cache_memory=1 << 30, dtype="float32", max_num_seqs=4,
            max_num_batched_tokens=40, tensor_parallel_size=size,
        ) as llm:  # fmt: skip
            tokens = [o.outputs[0].token_ids for o in llm.generate(prompts(6), PARAMS * 2)]
            results.append((tokens, llm.prompt_logits(IDS).cpu()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=0)


def hold_in_bfloat16(folder: Path, **options: Any) -> None:
    """Sums over ranks are rounded at other places, which turns ties: so both say what they think of the same tokens, in
    prompts, and decode steps in graphs say what prompts say."""
    logits = []
    for size in (1, 2):
        with LLM(
            str(folder), device="cuda", cache_memory=1 << 30, dtype="bfloat16", max_num_seqs=6,
            max_num_batched_tokens=64, tensor_parallel_size=size, **options,
        ) as llm:  # fmt: skip
            assert llm.info.decode_steps.startswith("CUDA graphs"), llm.info.decode_steps
            assert decode_against_prompts(llm).mean() < BF16_LOGPROB
            logits.append(llm.prompt_logits(IDS).cpu())
    assert divergences(*logits).mean() < BF16_KL


def test_logits_and_graphs_in_bfloat16(folder: Path) -> None:
    hold_in_bfloat16(folder)


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_experts_quantized_to_fp8(tmp_path: Path, name: str) -> None:
    hold_in_bfloat16(written(tmp_path, name), quantization="fp8")
