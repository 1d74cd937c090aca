"""GGUF files on a GPU: dequantised as they are loaded, and kept in blocks if asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fixtures.gguf_files import converted
from tests.models import random_checkpoint
from tests.models.served import BF16_KL, KIMI, PARAMS, prompts, qwen3_5
from thalweg import LLM

pytestmark = pytest.mark.gpu

IDS = prompts(9)[8]


def kimi_linear(folder: Path) -> Path:
    """With as many heads in KDA as in MLA, which is all that GGUF files can say."""
    c = random_checkpoint.config(**{**KIMI, "heads": KIMI["kda_heads"]})
    return random_checkpoint.write(folder, c, random_checkpoint.weights(c))


def log_probs(path: Path, **options: object) -> Tensor:
    with LLM(str(path), max_num_seqs=4, cache_memory=1 << 30, **options) as llm:  # type: ignore[arg-type]
        for output in llm.generate(prompts(3), PARAMS):
            assert output.outputs[0].finish_reason == "length"
        if options["device"] == "cuda":
            assert llm.info.decode_steps.startswith("eager") == (options["dequantize"] is False)
        return llm.prompt_logits(IDS).double().cpu().log_softmax(-1)


@pytest.mark.parametrize("family", [kimi_linear, lambda folder: qwen3_5().write(folder)], ids=["kimi", "qwen"])
@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m"])
def test_a_gpu_gives_what_a_cpu_gives(tmp_path: Path, family, outtype: str) -> None:  # type: ignore[no-untyped-def]
    path = converted(tmp_path / "model.gguf", outtype, str(family(tmp_path / "model")))
    expected = log_probs(path, device="cpu")
    for dequantize in (None, False):
        got = log_probs(path, device="cuda", dtype="bfloat16", dequantize=dequantize)
        kl = (expected.exp() * (expected - got)).sum(-1)
        assert kl.mean() < BF16_KL
        assert torch.isfinite(got).all()
