"""Experts in fp8 in CUDA C++: on the host, compiled for Hopper, when they are chosen. On a GPU: test_gpu_moe_fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import check_left_out, experts_in_float64, moe_case_fp8, rmse_ratio
from tests.ops.run_on_host import HostKernel
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims, steps_per_warp
from thalweg.ops.registry import Resolver, Where
from thalweg.quant import scheme_named

DIMS: dict[str, Any] = {"E": 257, "D": 2304, "I": 1024, "scheme": "fp8"}


@pytest.mark.parametrize(
    ("tokens", "gated", "columns", "rows"),
    [
        (8, 1, 2304, 1024),
        (16, 1, 2304, 1024),
        (8, 0, 1024, 2304),
        (16, 0, 1024, 2304),
        (8, 1, 7168, 2048),
        (8, 0, 512, 2048),
    ],
)
def test_they_compile_for_hopper(tmp_path: Path, tokens: int, gated: int, columns: int, rows: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.cuda_fp8 import SOURCE, blocks_per_multiprocessor, geometry

    warps, shared_bytes, macros = geometry(columns, tokens)
    compiled = compile_cuda(SOURCE, tmp_path, GATED=gated, OUT=rows, E=257, K=9, SHARED=1, ENDS=1 - gated, **macros)
    assert compiled.spilled_bytes == 0
    blocks = blocks_per_multiprocessor(warps, macros["TILES"])
    # As many fit a multiprocessor, and no more: else the next launch, which starts early, is spread unevenly.
    per_partition = -(-(warps + 1) * blocks // 4)  # warps of a quarter of a multiprocessor
    assert per_partition * compiled.registers * 32 <= 16384
    assert blocks == 4 or (blocks + 1) * (warps + 1) * 32 * compiled.registers > 65536  # four of five warps: timed
    assert blocks * (shared_bytes + compiled.static_shared_bytes + 1024) <= 228 * 1024


def test_gate_and_up_with_the_router_inside_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts import cuda_fp8, cuda_int4

    warps, shared_bytes, macros = cuda_fp8.geometry(7168, 1)
    macros |= dict(E=385, K=9, SHARED=1, ENDS=0, OUT=2048, GATED=1, ROUTES=1)
    compiled = compile_cuda(cuda_fp8.SOURCE, tmp_path, **macros)
    assert compiled.registers * 32 * (warps + 1) <= 65536
    assert compiled.spilled_bytes <= 32
    assert shared_bytes + compiled.static_shared_bytes + 1024 <= 228 * 1024
    cut = cuda_int4.geometry(7168, 384, 8, 1)
    assert cut is not None
    of_int4 = dict(COLS=7168, E=384, K=8, TOKENS=1, OWN=1, ENDS=0, OUT=2048, GATED=1, ROUTES=1)
    compiled = compile_cuda(cuda_int4.SOURCE, tmp_path, **of_int4, **cut.macros)
    assert compiled.registers * 32 * (cut.warps + 2) <= 65536
    assert cut.shared_bytes + compiled.static_shared_bytes + 1024 <= 228 * 1024


def test_down_of_one_token_compiles_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts import cuda_fp8

    warps, _, macros = cuda_fp8.geometry(2048, 1)
    macros = {n: macros[n] for n in ("COLS", "STEPS", "STAGES")} | {"OUT": 7168, "K": 9, "MOST_ROWS": 28}
    compiled = compile_cuda(cuda_fp8.ONE_SOURCE, tmp_path, **macros)
    assert compiled.spilled_bytes <= 16
    assert -(-2 * (warps + 1) // 4) * compiled.registers * 32 <= 16384  # two blocks to a multiprocessor
    assert 2 * (cuda_fp8.one_shared_bytes(2048, 9) + compiled.static_shared_bytes + 1024) <= 228 * 1024


@pytest.mark.parametrize(("T", "D"), [(2, 256), (1, 3584)])  # a ring that holds all steps of an item, and not
def test_gate_and_up_on_the_host(monkeypatch: pytest.MonkeyPatch, T: int, D: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts import cuda_fp8

    monkeypatch.setattr(cuda_fp8, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda_fp8, "multiprocessors", lambda device: 3)
    case = moe_case_fp8(T, D, 128, 4, 2, 1, torch.bfloat16, published=True)
    h = cuda_fp8.run_gate_up(case.x, case.ids, *case.gate_up, num_shared=1)
    w = [scheme_named("fp8").widened([t[e] for t in case.gate_up], 2, torch.float32).double() for e in range(5)]
    parts = [(w[e] @ case.x[t].double()).chunk(2) for t, of in enumerate(case.ids.tolist()) for e in of]
    assert rmse_ratio(h, torch.stack([F.silu(gate) * up for gate, up in parts])) < 0.004


@pytest.mark.parametrize("T", [1, 3])
def test_experts_on_the_host(monkeypatch: pytest.MonkeyPatch, T: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts import cuda_fp8

    monkeypatch.setattr(cuda_fp8, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda_fp8, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(cuda_fp8, "ENDING_COLUMNS", 128)
    case = moe_case_fp8(T, 128, 128, 4, 2, 1, torch.bfloat16, published=True)
    for _ in range(2):  # counters of who came are zero again
        y = case.run(cuda_fp8.experts, residual_TD=case.residual)
        assert rmse_ratio(y, experts_in_float64(case) + case.residual.double()) < 0.005
    check_left_out(case, cuda_fp8.experts, 0.005)


@pytest.mark.parametrize(("D", "I"), [(384, 256), (640, 512)])  # whose blocks have rows of two scales
def test_down_of_one_token_has_the_bits_of_down(monkeypatch: pytest.MonkeyPatch, D: int, I: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts import cuda_fp8

    monkeypatch.setattr(cuda_fp8, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda_fp8, "multiprocessors", lambda device: 3)
    case = moe_case_fp8(1, D, I, 10, 8, 1, torch.bfloat16, published=True)
    given = torch.randn(9, I).bfloat16(), case.ids, *case.down, case.weights, case.residual
    assert torch.equal(cuda_fp8.run_down_of_one(*given), cuda_fp8.run_down(*given))


def test_constants_are_those_of_the_source() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.cuda_fp8 import BUFFERS, ONE_SOURCE, SOURCE, TILE

    source = SOURCE.read_text()
    assert f"BUFFERS = {BUFFERS};" in ONE_SOURCE.read_text()
    assert "STEP_BYTES = 16 * BLOCK," in source
    assert f"BUFFERS = {BUFFERS};" in source
    assert f"TOKENS = {TILE} * TILES;" in source


def test_columns_are_shared_out_whole() -> None:
    assert [steps_per_warp(128 * n) for n in (1, 8, 12, 14, 18, 24, 28, 56)] == [1, 1, 1, 2, 2, 2, 4, 4]
    assert [steps_per_warp(n) for n in (0, 64, 128 * 13, 128 * 26, 128 * 60, 200)] == [None] * 6


@pytest.mark.parametrize(
    ("dims", "dtype", "reason"),
    [
        ({**DIMS, "E": 1025}, "bfloat16", "at most 1024 experts, not 1025"),
        ({**DIMS, "D": 200}, "bfloat16", "times 128, not 200 and 1024"),
        ({**DIMS, "I": 13 * 128}, "bfloat16", "times 128, not 2304 and 1664"),
        (DIMS, "float32", "needs bfloat16, not float32"),
        ({**DIMS, "scheme": "none"}, "bfloat16", "needs weights in scheme fp8 or int4, not none"),
    ],
)
def test_what_they_do_not_serve_they_refuse_with_a_reason(dims: dict[str, Any], dtype: str, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(EXPERTS, Where("cuda", dtype), ExpertsDims(**dims))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]
