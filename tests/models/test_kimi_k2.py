"""DeepSeek-V3's architecture on other shapes than the oracles', in every published format, against a second
implementation in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import naive_kimi_k2 as naive
from tests.models import random_kimi_k2 as random
from thalweg import LLM

ATOL = 2e-4

SHAPES: dict[str, dict[str, Any]] = {
    "YaRN of factor 64 with beta_fast 32, 2 dense layers, 12 experts of which 3": dict(
        layers=4, dense=2, experts=12, top_k=3, rope=16, rope_scaling={**random.YARN, "factor": 64.0,
                                                                       "beta_fast": 32.0},
    ),
    "4 groups of which 2": dict(experts=16, top_k=4, groups=4, top_groups=2, shared=2, hidden=48, inner=24),
    "8 groups of which 4, 3 dense layers": dict(model_type="deepseek_v3", layers=5, dense=3, experts=16, top_k=3,
                                                groups=8, top_groups=4, routed_scaling_factor=2.5),
    "queries of full rank, no YaRN": dict(q_rank=None, rope_scaling=None, heads=3, rope=6, nope=10, value=12),
    "mscale of another size than mscale_all_dim": dict(rope_scaling={**random.YARN, "mscale": 0.7,
                                                                     "mscale_all_dim": 0.3}),
    "mscale of cosines alone": dict(rope_scaling={**random.YARN, "mscale_all_dim": 0.0}),
    "no shared experts, weights as they are": dict(shared=0, norm_topk_prob=False, routed_scaling_factor=1.0),
    "every layer dense": dict(layers=2, dense=2),
}  # fmt: skip
GROUPED = "4 groups of which 2"


def ids_of(c: dict[str, Any], n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, c["vocab_size"], n).tolist()


def holds(folder: Path, ids: list[int], expected: Tensor, **options: Any) -> None:
    with LLM(str(folder), dtype="float32", max_num_seqs=2, **options) as llm:
        np.testing.assert_allclose(llm.prompt_logits(ids).numpy(), expected.numpy(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_against_float64(tmp_path: Path, name: str) -> None:
    c = random.config(**SHAPES[name])
    w = random.weights(c, seed=3)
    ids = ids_of(c, 61)
    folder, expected = random.write(tmp_path / "model", c, w), naive.logits(c, w, ids)
    for chunk, block_size in ((4096, 16), (13, 8), (1, 1)):
        holds(folder, ids, expected, max_num_batched_tokens=chunk, block_size=block_size)


# Blocks and groups that are ragged, and two blocks in some.
WIDE: dict[str, Any] = dict(hidden=144, q_rank=136, rank=136, inner=136, dense_inner=160, heads=4)


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_published_formats(tmp_path: Path, scheme: str, form: str) -> None:
    """Beside tensors of a vision model and of an MTP layer, which hold NaN."""
    c = random.config(**WIDE, num_nextn_predict_layers=1)
    w = random.weights(c)
    stored, held = random.in_fp8(w) if scheme == "fp8" else random.in_int4(w)

    def nothing() -> Tensor:
        return torch.full((2, 2), torch.nan)

    stored |= {"model.layers.3.eh_proj.weight": nothing(), "model.layers.3.shared_head.head.weight": nothing()}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = nothing()
    raw = {**c, "quantization_config": random.FP8 if scheme == "fp8" else random.INT4}
    if form == "nested":
        raw = random.nested(raw)
        stored = {f"language_model.{name}": tensor for name, tensor in stored.items()}
        stored |= {"vision_tower.encoder.weight": nothing(), "mm_projector.proj.0.weight": nothing()}
    folder, ids = random.write(tmp_path / "model", raw, stored), ids_of(c, 30)
    for chunk in (4096, 7):
        holds(folder, ids, naive.logits(c, held, ids), max_num_batched_tokens=chunk)


def test_int4_shared_experts_stand_among_the_routed_ones(tmp_path: Path) -> None:
    c = random.config(hidden=96, inner=40)
    stored, held = random.in_int4(random.weights(c), of=(".mlp.experts.", ".mlp.shared_experts."))
    folder = random.write(tmp_path / "model", {**c, "quantization_config": random.INT4}, stored)
    ids = ids_of(c, 30)
    holds(folder, ids, naive.logits(c, held, ids))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scheme", ["none", "fp8", "int4"])
def test_ranks_give_the_logits_of_one(tmp_path: Path, ranks: int, scheme: str) -> None:
    """With grouped routing; int4 ranks cut between groups of 32 columns, or within one group."""
    c = random.config(**{**SHAPES[GROUPED], **dict(inner=32 * ranks if scheme == "int4" else 24, heads=8)})
    w = random.weights(c)
    stored, held = {"none": lambda w: (w, w), "fp8": random.in_fp8, "int4": random.in_int4}[scheme](w)
    more = {"none": {}, "fp8": {"quantization_config": random.FP8}, "int4": {"quantization_config": random.INT4}}
    folder, ids = random.write(tmp_path / "model", {**c, **more[scheme]}, stored), ids_of(c, 40)
    holds(folder, ids, naive.logits(c, held, ids), tensor_parallel_size=ranks, max_num_batched_tokens=16)
