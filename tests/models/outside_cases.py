"""Random checkpoints of each architecture and published format, whose logits an outside implementation computed
(scripts/outside_logits.py).

Weights are drawn from a seed when they are needed; only ids, logits and tokens are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models import random_checkpoint, random_kimi_k2, random_qwen

STORED = Path(__file__).parents[1] / "fixtures" / "outside_logits.npz"
PROMPTS, POSITIONS, GREEDY = 2, 40, 12  # ids [PROMPTS, POSITIONS]; GREEDY tokens follow the first half of each prompt


@dataclass(frozen=True)
class Case:
    """A checkpoint as it is published, and the tensors that it stands for if those are others: transformers is given
    the dequantised ones."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    held: dict[str, Tensor] | None = None


def kimi_linear() -> Case:
    c = random_checkpoint.config(pad_token_id=2)
    return Case(c, random_checkpoint.weights(c, seed=1))


def kimi_k2() -> Case:
    c = random_kimi_k2.config(vocab=128)
    return Case(c, random_kimi_k2.weights(c, seed=1))


def kimi_k2_fp8() -> Case:
    c = random_kimi_k2.config(vocab=128, hidden=144)
    stored, held = random_kimi_k2.in_fp8(random_kimi_k2.weights(c, seed=3))
    return Case(c | {"quantization_config": random_kimi_k2.FP8}, stored, held)


def kimi_k2_int4() -> Case:
    c = random_kimi_k2.config(vocab=128)
    stored, held = random_kimi_k2.in_int4(random_kimi_k2.weights(c, seed=4))
    return Case(c | {"quantization_config": random_kimi_k2.INT4}, stored, held)


def qwen3_5() -> Case:
    c = random_qwen.config(dense=48, vocab=128) | {"dtype": "float32"}
    return Case(c, random_qwen.weights(c, seed=1))


def qwen3_5_moe() -> Case:
    c = random_qwen.config(vocab=128) | {"dtype": "float32"}
    return Case(c, random_qwen.published(c, random_qwen.weights(c, seed=1), prefix="model.", stacked=True))


def qwen3_5_fp8() -> Case:
    return _qwen_in_fp8(random_qwen.config(dense=48, vocab=128, hidden=144), seed=3)


def qwen3_5_moe_fp8() -> Case:
    return _qwen_in_fp8(random_qwen.config(vocab=128, hidden=144), seed=4)


def qwen3_next() -> Case:
    c = random_qwen.config(vocab=128) | {"dtype": "float32"}
    w = random_qwen.published(c, random_qwen.weights(c, seed=2), prefix="model.", packed=True)
    return Case(random_qwen.as_next(c), w)


def _qwen_in_fp8(c: dict[str, Any], seed: int) -> Case:
    """Experts one by one, as they are published in float8; transformers has them stacked."""
    stored, quantization = random_qwen.in_fp8(random_qwen.weights(c, seed=seed))
    held = random_qwen.published(c, random_qwen.out_of_fp8(stored), prefix="model.", stacked=True)
    return Case(c | {"dtype": "float32", "quantization_config": quantization}, stored, held)


_CASES = (
    kimi_linear,
    kimi_k2,
    kimi_k2_fp8,
    kimi_k2_int4,
    qwen3_5,
    qwen3_5_moe,
    qwen3_5_fp8,
    qwen3_5_moe_fp8,
    qwen3_next,
)
CASES = {case.__name__: case for case in _CASES}


def write(name: str, folder: Path, *, dequantised: bool = False) -> tuple[Path, float]:
    """The checkpoint's folder, and a fingerprint of its weights, which instruction sets move by little."""
    case = CASES[name]()
    held = case.tensors if case.held is None else case.held
    fingerprint = sum(
        float((held[key].double().flatten() * torch.arange(held[key].numel())).abs().mean()) for key in sorted(held)
    )
    if dequantised:
        plain = {key: value for key, value in case.config.items() if key != "quantization_config"}
        return random_checkpoint.write(folder, plain, held), fingerprint
    return random_checkpoint.write(folder, case.config, case.tensors), fingerprint


def prompts(vocab_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(7).integers(3, vocab_size, (PROMPTS, POSITIONS))
