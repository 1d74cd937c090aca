"""What `thalweg inspect` says of how steps would run: what an engine says of itself at start."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.models import random_checkpoint as random
from tests.models import random_kimi_k2, random_qwen
from tests.ops.cpp_case import needs_cpp
from thalweg.assembly.inspect import describe
from thalweg.assembly.rank import build_rank
from thalweg.assembly.steps import choose_steps
from thalweg.cache.memory import MemorySplit
from thalweg.cli import main
from thalweg.config.engine import EngineConfig
from thalweg.ops.registry import Resolver


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(vocab=128, context=300, kda_dim=16)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


def both(folder: Path, **options: Any) -> tuple[tuple[str | None, str | None], tuple[str, str]]:
    """(steps of decodes alone, steps with prompts), as inspected and as an engine says."""
    config = EngineConfig(str(folder), device="cpu", **options)
    found = describe(config)
    runner, info = build_rank(config, 0, "")
    runner.close()
    return (found.decode_steps, found.prefill_steps), (info.decode_steps, info.prefill_steps)


@needs_cpp
@pytest.mark.parametrize("family", [random_kimi_k2, random_qwen], ids=["kimi_k2", "qwen"])
def test_every_family_is_told_to_be_recorded_as_it_is(family: ModuleType, tmp_path: Path) -> None:
    c = family.config()
    inspected, built = both(family.write(tmp_path, c, family.weights(c)), max_num_seqs=5)
    assert inspected == built
    assert str(inspected[0]).startswith("recorded calls of up to 5 rows, eager beyond; results take up to ")
    assert inspected[1] == "eager: cpu has no CUDA graphs"


@needs_cpp
@pytest.mark.parametrize(
    ("options", "decodes"),
    [
        ({}, "recorded calls of up to 64 rows, eager beyond; results take up to 1 MiB"),
        ({"enforce_eager": True}, "eager: --enforce-eager"),
        (
            {"op_preference": {"norm_swiglu": "reference"}},
            "eager: op norm_swiglu is served by 'reference', which runs in torch",
        ),
        (
            {"op_preference": {"norm_linear": "separate"}},
            "eager: op norm_linear is served by 'separate', which runs in torch",
        ),
    ],
)
def test_options_change_what_is_told_as_they_change_the_engine(
    folder: Path, options: dict[str, Any], decodes: str
) -> None:
    inspected, built = both(folder, **options)
    assert inspected == built
    assert inspected[0] == decodes


def test_the_command_prints_both_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--enforce-eager"]) == 0
    printed = capsys.readouterr().out
    assert "of decodes alone  eager: --enforce-eager\n" in printed
    assert "with prompts      eager: --enforce-eager\n" in printed


def test_nothing_is_told_of_steps_if_the_memory_does_not_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = describe(EngineConfig(str(folder), device="cpu", cache_memory=1000))
    assert found.memory_error is not None
    assert found.decode_steps is found.prefill_steps is None
    assert main(["inspect", str(folder), "--cache-memory", "1000"]) == 0
    assert "of decodes alone" not in capsys.readouterr().out


def test_on_a_gpu_the_sizes_of_graphs_are_told_or_why_there_are_none() -> None:
    split = MemorySplit(5, 100, 64, 4096, 1, 1, 1 << 30)
    config = EngineConfig("m", device="cuda", max_num_batched_tokens=8192, prefill_graph_tokens=512)
    steps = choose_steps(config, torch.device("cuda"), Resolver(), split, 0)
    assert (steps.graph_sizes, steps.recorded_rows, steps.prefill_tokens) == ([1, 2, 4, 5], 0, 512)
    assert steps.decodes == "CUDA graphs of 1, 2, 4, 5 rows"
    assert steps.prefills == "CUDA graphs of up to 512 tokens, eager beyond"
