"""Random checkpoints, one for each family, whose logits an outside implementation computed (scripts/outside_logits.py).

Weights are drawn from a seed when they are needed; only ids, logits and tokens are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models import random_checkpoint, random_kimi_k2, random_qwen

STORED = Path(__file__).parents[1] / "fixtures" / "outside_logits.npz"
PROMPTS, POSITIONS, GREEDY = 2, 40, 12  # ids [PROMPTS, POSITIONS]; GREEDY tokens follow the first half of each prompt

Case = tuple[dict[str, Any], dict[str, Tensor]]


def kimi_linear() -> Case:
    c = random_checkpoint.config(pad_token_id=2)
    return c, random_checkpoint.weights(c, seed=1)


def kimi_k2() -> Case:
    c = random_kimi_k2.config(vocab=128)
    return c, random_kimi_k2.weights(c, seed=1)


def qwen3_5() -> Case:
    c = random_qwen.config(dense=48, vocab=128) | {"dtype": "float32"}
    return c, random_qwen.weights(c, seed=1)


def qwen3_5_moe() -> Case:
    c = random_qwen.config(vocab=128) | {"dtype": "float32"}
    return c, random_qwen.published(c, random_qwen.weights(c, seed=1), prefix="model.", stacked=True)


def qwen3_next() -> Case:
    c = random_qwen.config(vocab=128) | {"dtype": "float32"}
    return random_qwen.as_next(c), random_qwen.published(
        c, random_qwen.weights(c, seed=2), prefix="model.", packed=True
    )


CASES = {case.__name__: case for case in (kimi_linear, kimi_k2, qwen3_5, qwen3_5_moe, qwen3_next)}


def write(name: str, folder: Path) -> tuple[Path, float]:
    """The checkpoint's folder, and a fingerprint of its weights, which instruction sets move by little."""
    c, w = CASES[name]()
    fingerprint = sum(
        float((w[key].double().flatten() * torch.arange(w[key].numel())).abs().mean()) for key in sorted(w)
    )
    return random_checkpoint.write(folder, c, w), fingerprint


def prompts(vocab_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(7).integers(3, vocab_size, (PROMPTS, POSITIONS))
