"""The decode mixer of gated attention in CUDA C++: run on the host, compiled for Hopper, how contexts are shared out,
and when it is chosen. Clusters and results of the device: test_gpu_qwen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.gqa_case import GqaCase, GqaShape
from tests.ops.run_on_host import HostKernel
from thalweg.ops.attention.gqa import GQA_MIXER_DECODE, GqaDims, cuda
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain.counters import counters

FORMS, form_for = cuda.FORMS, cuda.form_for
HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a multiprocessor's blocks may have


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda, "FORMS", [(1, 1), (1, 2)])  # without clusters
    monkeypatch.setattr(cuda, "form_for", lambda *_: (1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "contexts", "choice"),
    [
        (GqaShape(4, 1, 256, 64, 64), [0, 1, 30], (1, 1, 1)),
        (GqaShape(12, 2, 256, 128, 16), [15, 16, 100], (1, 2, 1)),
        (GqaShape(8, 1, 256, 64, 64), [300], (1, 2, 1)),
        (GqaShape(8, 2, 256, 64, 64), [9, 255, 256, 300, 500], (1, 1, 4)),
    ],
)
def test_results_and_the_rows_that_are_written(
    shape: GqaShape, contexts: list[int], choice: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "form_for", lambda *_: choice)
    arrived = counters("gqa_mixer_decode", torch.device("cpu"), cuda.COUNTERS)
    case = GqaCase(shape, contexts, [1] * len(contexts), torch.bfloat16, scale=1.1)
    case.check_mix(cuda.gqa_mixer_decode, 2**-6, padding=1)
    assert not arrived.any()


def test_positions_far_out() -> None:
    case = GqaCase(GqaShape(2, 1, 256, 64, 64), [20], [1], torch.bfloat16, first_position=1_000_000)
    case.check_mix(cuda.gqa_mixer_decode, 2**-6)


def test_no_rows() -> None:
    case = GqaCase(GqaShape(2, 1, 256, 64, 64), [20], [1], torch.bfloat16)
    case.cached, case.proj, case.tables = [], case.proj[:0], case.tables[:0]
    case.rows, case.positions = case.rows[:0], case.positions[:0]
    assert case.mix(cuda.gqa_mixer_decode).shape == (0, 512)


def test_contexts_fill_the_device() -> None:
    numbers = (1, 2, 4, 7, 8, 15, 16, 17, 33, 34, 66, 67, 132, 133, 512)
    forms = [form_for(groups, 132) for groups in numbers]
    few = [(16, 1, 7), (16, 1, 7), (16, 1, 3), (16, 1, 2), (8, 1, 3), (8, 1, 2), (8, 1, 1), (2, 1, 7), (2, 1, 4)]
    assert forms == [*few, (2, 2, 1), (2, 2, 1), (1, 2, 1), (1, 2, 1), (1, 1, 1), (1, 1, 1)]
    assert {(splits, stages) for splits, stages, _ in forms} == set(FORMS)
    for groups in range(1, 600):
        splits, stages, parts = form_for(groups, 132)
        assert parts >= 1
        assert parts == 1 or groups * splits * parts <= (3 - stages) * 132
        assert parts == 1 or groups * splits <= cuda.COUNTERS


@pytest.mark.parametrize(("splits", "stages"), cuda.FORMS)
@pytest.mark.parametrize(("ratio", "norm_float"), [(4, 0), (8, 1)])
def test_it_compiles_for_hopper_without_spills(
    tmp_path: Path, ratio: int, norm_float: int, splits: int, stages: int
) -> None:
    macros = dict(RATIO=ratio, HALF=32, NORM_FLOAT=norm_float, SPLITS=splits, STAGES=stages, BLOCK=64)
    compiled = compile_cuda(cuda.SOURCE, tmp_path, **macros)
    blocks = 3 - stages
    assert compiled.spilled_bytes == 0
    assert compiled.registers * cuda.THREADS * blocks <= 65536
    assert blocks * (compiled.static_shared_bytes + cuda.shared_bytes(stages) + 1024) <= HOPPER_SHARED + 1024


DIMS = dict(H=16, G=2, K=256, R=64, S=64)


@pytest.mark.parametrize(
    ("dims", "dtype", "reason"),
    [
        ({"H": 18}, "bfloat16", "at most 8 heads to a key head"),
        ({"R": 32}, "bfloat16", "a multiple of 64 rotated dims, not 8, 32"),
        ({"K": 128}, "bfloat16", "heads of 256 dims"),
        ({"S": 8}, "bfloat16", "a multiple of 16 tokens"),
        ({}, "float32", "needs bfloat16"),
    ],
)
def test_what_it_does_not_serve_it_refuses_with_a_reason(dims: dict[str, int], dtype: str, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(GQA_MIXER_DECODE, Where("cuda", dtype), GqaDims(**DIMS | dims))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]
