"""A random model of each family in dimensions that every kernel serves, small enough to run in seconds, with a float64
twin; and what tests of devices ask of a model: prompts, ways to sample, decode steps held to a prompt's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models import naive_kimi_linear, naive_qwen, random_qwen
from tests.models import random_checkpoint as random_kimi
from thalweg import LLM, SamplingParams

VOCAB = 1000
KIMI = dict(layers=4, full=(3,), hidden=256, kda_heads=8, kda_dim=128, heads=4, nope=128, rope=64, value=128,
            rank=128, experts=16, top_k=4, shared=1, inner=256, vocab=VOCAB, context=600)  # fmt: skip
QWEN = dict(hidden=256, key_heads=2, value_heads=6, key_dim=128, value_dim=128, heads=4, kv_heads=2, head_dim=256,
            experts=16, top_k=4, inner=256, shared=256, vocab=VOCAB, context=600, dtype="float32")  # fmt: skip
# What bfloat16 may do in these models. Measured on a CPU: a mean KL of 0.01 in Kimi-Linear and 6e-4 in the others, a
# mean difference of decode's log-probabilities of 0.02 and 0.007; another model's differ by units.
BF16_KL, BF16_LOGPROB = 0.03, 0.06
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=25, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=30, seed=4, top_p=0.9, ignore_eos=True),
]


@dataclass(frozen=True)
class Model:
    """config.json, the tensors of a checkpoint, and float64 logits [T, V] of ids."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    twin: Callable[[list[int]], Tensor]

    def write(self, folder: Path) -> Path:
        return random_kimi.write(folder, self.config, self.tensors)


def kimi_linear() -> Model:
    c = random_kimi.config(**KIMI)
    w = random_kimi.weights(c)
    return Model(c, w, lambda ids: naive_kimi_linear.logits(c, w, ids))


def qwen3_5() -> Model:
    c = random_qwen.config(**QWEN, dense=512)
    w = random_qwen.weights(c)
    return Model(random_qwen.nested(c), random_qwen.published(c, w), lambda ids: naive_qwen.logits(c, w, ids))


def qwen3_next() -> Model:
    c = random_qwen.config(**QWEN)
    w = random_qwen.weights(c)
    tensors = random_qwen.published(c, w, prefix="model.", packed=True)
    return Model(random_qwen.as_next(c), tensors, lambda ids: naive_qwen.logits(c, w, ids))


def qwen3_5_moe_fp8() -> Model:
    c = random_qwen.config(**QWEN)
    tensors, quantization = random_qwen.in_fp8(random_qwen.published(c, random_qwen.weights(c)))
    held = random_qwen.unpublished(c, random_qwen.out_of_fp8(tensors))
    raw = random_qwen.nested({**c, "quantization_config": quantization})
    return Model(raw, tensors, lambda ids: naive_qwen.logits(c, held, ids))


FAMILIES = {f.__name__: f for f in (kimi_linear, qwen3_5, qwen3_next, qwen3_5_moe_fp8)}


def on_gpu(model: Path, dtype: str, **options: Any) -> LLM:
    """With a cache of 1 GiB, not all of the device's memory: several tests may have a model there at once."""
    return LLM(str(model), device="cuda", dtype=dtype, cache_memory=1 << 30, **options)


def prompts(n: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCAB, 3 + 17 * i).tolist() for i in range(n)]


def decode_against_prompts(llm: LLM) -> Tensor:
    """|log-probability of a token as a decode step gave it - as a prompt of the same tokens gives it|, of every token
    that greedy and drawn answers took. The prompt forces the tokens, so a tie that rounding turns does not count."""
    asked, differences = prompts(9), []
    params = [
        SamplingParams(max_tokens=24, temperature=i % 3, seed=i, logprobs=0, ignore_eos=True) for i in range(len(asked))
    ]
    for prompt, output in zip(asked, llm.generate(asked, params), strict=True):
        tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert entries is not None
        given = torch.tensor([entry.logprob for entry in entries])
        rows = llm.prompt_logits(prompt + tokens).float().cpu()[len(prompt) - 1 : -1].log_softmax(-1)
        differences.append((given - rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]).abs())
    return torch.cat(differences)
