"""Data-parallel ranks divide the routed experts of every format: each rank loads its own, and knows the others'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fixtures.gguf_files import converted
from tests.models import random_checkpoint as kimi
from tests.models import random_kimi_k2 as k2
from tests.models import random_qwen as qwen
from tests.models.plans import read
from thalweg.assembly.source import open_source
from thalweg.config.engine import EngineConfig
from thalweg.errors import CheckpointError, ConfigError
from thalweg.models import family_of
from thalweg.models.family import weight_plan
from thalweg.parallel.placement import Placement
from thalweg.parallel.shards import Shards
from thalweg.weights.load import bytes_to_load, check, load
from thalweg.weights.plan import Target, checkpoint_shapes, parameters


def formats() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    of_kimi = kimi.config(experts=6, shared=2)
    of_k2 = k2.config(experts=6, inner=128, shared=2)
    of_qwen = qwen.config(experts=6, shared=24)
    k2_tensors = k2.weights(of_k2)
    return {
        "Kimi-Linear": (of_kimi, kimi.weights(of_kimi)),
        "Kimi-K2": (of_k2, k2_tensors),
        "Kimi-K2 in fp8": ({**of_k2, "quantization_config": k2.FP8}, k2.in_fp8(k2_tensors)[0]),
        "Kimi-K2 in int4": ({**of_k2, "quantization_config": k2.INT4}, k2.in_int4(k2_tensors)[0]),
        "Qwen3.5, stacked": (qwen.nested(of_qwen), qwen.published(of_qwen, qwen.weights(of_qwen), stacked=True)),
        "Qwen3.5, each expert": (qwen.nested(of_qwen), qwen.published(of_qwen, qwen.weights(of_qwen))),
    }


def loaded(
    folder: Path, shards: Shards, quantization: str | None = None, placements: dict[int, Placement] | None = None
) -> tuple[list[Target], dict[str, Tensor]]:
    source = replace(open_source(EngineConfig(str(folder))), placements=placements or {})
    checkpoint = source.open_weights()
    source = source.fitted(checkpoint)
    plan = source.plan(shards, quantization)
    params = {}
    for target in plan:
        for stored in target.parameters:
            dtype = torch.float32 if stored.dtype == "model" else getattr(torch, stored.dtype)
            params[target.name + stored.suffix] = torch.zeros(stored.shape, dtype=dtype)
    done: list[int] = []
    load(plan, checkpoint, params.__getitem__, ignore=source.ignored, progress=done.append)
    assert sum(done) == bytes_to_load(plan, checkpoint)
    return plan, params


def check_shares(folder: Path, experts: int, quantization: str | None = None) -> None:
    plan, whole = loaded(folder, Shards(), quantization)
    for size in (2, 3):
        ranks = [loaded(folder, Shards(0, 1, rank, size), quantization) for rank in range(size)]
        for name, value in whole.items():
            parts = [params[name] for _, params in ranks]
            if ".experts." not in name:
                assert all(torch.equal(part, value) for part in parts), name
                continue
            here = experts // size
            assert torch.equal(torch.cat([part[:here] for part in parts]), value[:experts]), name
            assert all(torch.equal(part[here:], value[experts:]) for part in parts), name
        for other, _ in ranks:
            assert checkpoint_shapes(other) == checkpoint_shapes(plan)
            assert parameters(other) == parameters(plan)


@pytest.mark.parametrize("name", formats())
def test_ranks_hold_their_experts_and_all_else(name: str, tmp_path: Path) -> None:
    check_shares(kimi.write(tmp_path, *formats()[name]), 6)


@pytest.mark.parametrize("name", formats())
def test_ranks_hold_the_experts_that_a_file_gives_them(name: str, tmp_path: Path) -> None:
    folder = kimi.write(tmp_path, *formats()[name])
    plan, whole = loaded(folder, Shards())
    slots = ((3, 0, 5, 1), (2, 3, 4, 0))
    for rank, mine in enumerate(slots):
        other, params = loaded(folder, Shards(0, 1, rank, 2), None, dict.fromkeys((1, 2), Placement(slots)))
        assert checkpoint_shapes(other) == checkpoint_shapes(plan)
        assert parameters(other) == parameters(plan)
        for kind in ("gate_up", "down"):
            value = whole[f"layers.1.mlp.experts.{kind}"]
            expected = torch.cat([value[list(mine)], value[6:]])
            assert torch.equal(params[f"layers.1.mlp.experts.{kind}"], expected)


def test_gguf_with_experts_in_blocks(tmp_path: Path) -> None:
    c = kimi.config(hidden=64, inner=32, experts=6, kda_dim=32, value=32, rank=32, nope=32, dense_inner=64)
    folder = kimi.write(tmp_path / "model", c, kimi.weights(c))
    check_shares(converted(tmp_path / "model.gguf", "q8_0", str(folder)), 6)


def test_experts_quantized_as_they_are_loaded(tmp_path: Path) -> None:
    check_shares(kimi.write(tmp_path, *formats()["Kimi-Linear"]), 6, "fp8")


def test_a_rank_misses_what_only_others_need(tmp_path: Path) -> None:
    raw, tensors = formats()["Kimi-Linear"]
    del tensors["model.layers.1.block_sparse_moe.experts.5.w1.weight"]
    kimi.write(tmp_path, raw, tensors)
    source = open_source(EngineConfig(str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"1 missing: .*experts\.5\.w1"):
        check(source.plan(Shards(0, 1, 0, 2)), source.open_weights())


@pytest.mark.parametrize(
    ("raw", "quantization", "message"),
    [
        (kimi.config(experts=8), None, "--data-parallel-size is 3; it must divide the number of experts, which is 8"),
        (qwen.config(dense=40), None, "none; leave it out"),
    ],
)
def test_what_ranks_cannot_divide_is_named(raw: dict[str, Any], quantization: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weight_plan(family_of(raw), read(raw), Shards(0, 1, 0, 3))


def test_stacked_experts_whose_blocks_gate_and_up_share_are_refused(tmp_path: Path) -> None:
    folder = kimi.write(tmp_path, *formats()["Qwen3.5, stacked"])
    with pytest.raises(ConfigError, match="moe_intermediate_size to be a multiple of 128"):
        loaded(folder, Shards(0, 1, 0, 2), "fp8")
