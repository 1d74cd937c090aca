"""Files that llama.cpp wrote against logits: its own of quantised ones, those of the checkpoint for converted ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg import LLM
from thalweg.ops.linear import reference as linear_reference
from thalweg.ops.moe.experts import reference as experts_reference
from thalweg.ops.projection import reference as projection_reference

# llama.cpp multiplies quantised weights with activations that are rounded to 8 bits, and where that turns the choice of
# an expert, a position of a random network is off by a hundred times as much as the others.
QUANTISED = {"Q8_0": 32, "Q6_K": 256, "Q4_K_M": 256}  # elements that share an activation's scale


def llama_rounding(x: Tensor, block: int) -> Tensor:
    """Activations as llama.cpp rounds them: int8 with a scale per block, of 32 where 256 do not divide a row."""
    block = block if x.shape[-1] % block == 0 else 32
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = (largest.abs() / 127).half().float() if block == 32 else largest / -127
    scale = torch.where(scale == 0, 1.0, scale)
    return ((blocks / scale).round().clamp(-128, 127) * scale).flatten(-2)


class _RoundedF:
    """torch.nn.functional with a linear of rounded activations."""

    def __init__(self, block: int) -> None:
        self._block = block

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(F, name)

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(llama_rounding(x, self._block), w)


@pytest.fixture
def as_llama(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function that makes references round activations as llama.cpp does."""

    def patch(block: int) -> None:
        rounded, projection = _RoundedF(block), projection_reference.batched_projection
        monkeypatch.setattr(linear_reference, "F", rounded)
        monkeypatch.setattr(experts_reference, "F", rounded)
        monkeypatch.setattr(linear_reference, "linear_add", lambda x, w, residual: residual + rounded.linear(x, w))
        monkeypatch.setattr(
            projection_reference, "batched_projection", lambda x, w: projection(llama_rounding(x, 32), w)
        )

    return patch


def divergences(folder: Path, name: str) -> Tensor:
    """KL of ours from llama.cpp's next-token distribution, at each of 70 positions."""
    recorded = np.load(folder / f"model-{name}.npz")
    with LLM(str(folder / f"model-{name}.gguf"), max_num_seqs=4, block_size=16) as llm:
        ours = llm.prompt_logits(recorded["ids"][0]).double().log_softmax(-1)
    theirs = torch.from_numpy(recorded["logits"][0]).double().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_files_agree_with_llama_cpp(shared_dir: Path, name: str) -> None:
    """By the median, which no turned choice of an expert moves, and the mean, which a few do."""
    kl = divergences(shared_dir / "oracles" / "kimi_linear_gguf", name)
    assert kl.median() < (2e-4 if name == "Q8_0" else 5e-4)
    assert kl.mean() < (1e-3 if name == "Q8_0" else 5e-3)


@pytest.mark.parametrize("name", QUANTISED)
def test_more_so_with_its_rounding_of_activations(shared_dir: Path, name: str, as_llama) -> None:  # type: ignore[no-untyped-def]
    as_llama(QUANTISED[name])
    kl = divergences(shared_dir / "oracles" / "kimi_linear_gguf", name)
    assert kl.median() < 2.5e-4
    assert kl.mean() < (1e-3 if name == "Q8_0" else 3e-3)
