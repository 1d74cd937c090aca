"""Files that llama.cpp wrote against logits: its own of quantised ones, those of the checkpoint for converted ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.cpp_case import needs_cpp
from thalweg import LLM

# Where rounding activations to 8 bits turns the choice of an expert, a position of a random network is off by a hundred
# times as much as the others.
QUANTISED = ("Q8_0", "Q6_K", "Q4_K_M")


def divergences(folder: Path, name: str, *, quantize_activations: bool) -> Tensor:
    """KL of ours from llama.cpp's next-token distribution, at each of 70 positions."""
    recorded, file = np.load(folder / f"model-{name}.npz"), folder / f"model-{name}.gguf"
    with LLM(str(file), quantize_activations=quantize_activations, max_num_seqs=4, block_size=16) as llm:
        ours = llm.prompt_logits(recorded["ids"][0]).double().log_softmax(-1)
    theirs = torch.from_numpy(recorded["logits"][0]).double().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


@needs_cpp
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_files_agree_with_llama_cpp(shared_dir: Path, name: str) -> None:
    """By the median, which no turned choice of an expert moves, and the mean, which a few do."""
    kl = divergences(shared_dir / "oracles" / "kimi_linear_gguf", name, quantize_activations=True)
    assert kl.median() < (2e-4 if name == "Q8_0" else 3.2e-4)
    assert kl.mean() < (1e-3 if name == "Q8_0" else 3e-3)


@pytest.mark.parametrize("name", QUANTISED)
def test_less_so_without_its_rounding_of_activations(shared_dir: Path, name: str) -> None:
    kl = divergences(shared_dir / "oracles" / "kimi_linear_gguf", name, quantize_activations=False)
    assert kl.median() < (2e-4 if name == "Q8_0" else 5e-4)
    assert kl.mean() < (1e-3 if name == "Q8_0" else 5e-3)
