"""Experts in two launches of CUDA C++: on the host, compiled for Hopper, when they are chosen. On a GPU:
test_gpu_moe_int4, test_gpu_moe_fp8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import check_left_out, experts_in_float64, moe_case_int4, own_beside, rmse_ratio
from tests.ops.run_on_host import HostKernel, host_tensor_map
from thalweg.ops.moe import experts
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims, cuda_int4
from thalweg.ops.moe.experts.cuda_int4 import MAX_TOKENS, SOURCE, geometry, static_bytes
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain import cuda_build

DIMS: dict[str, Any] = {"E": 384, "D": 7168, "I": 2048, "scheme": "int4", "own": 2048}


@pytest.mark.parametrize(
    ("T", "D", "I", "own", "skewed"),
    [
        (1, 256, 256, 256, False),
        (2, 2304, 256, 256, False),  # two blocks of an odd number of warps
        (3, 256, 256, 0, True),  # passes of one, two and four tokens, as they are chosen
        (8, 256, 512, 512, False),
        # An expert has two passes, of eight and of five; the own expert has two passes.
        (13, 256, 256, 256, True),
        (40, 256, 256, 256, False),
    ],
)
def test_on_the_host(monkeypatch: pytest.MonkeyPatch, T: int, D: int, I: int, own: int, skewed: bool) -> None:
    monkeypatch.setattr(cuda_int4, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda_int4, "tensor_map", host_tensor_map)
    monkeypatch.setattr(cuda_int4, "multiprocessors", lambda device: 3)
    case = moe_case_int4(T, D, I, 5, 1 if T == 2 else 2, torch.bfloat16, seed=T, own=own, scale=2.5)
    if skewed:
        case.ids[:] = case.ids[0]
    y = case.run(cuda_int4.experts, residual_TD=case.residual)
    assert rmse_ratio(y, experts_in_float64(case) + case.residual.double()) < 0.004
    if not own:
        check_left_out(case, cuda_int4.experts, 0.004)
    if own and T > 2:
        parts = replace(case, scale=0.0).run(cuda_int4.experts), replace(case, own=None).run(cuda_int4.experts)
        added = (parts[0].float() + 2.5 * parts[1].float()).bfloat16()
        assert torch.equal(y, case.residual + added)


@pytest.mark.parametrize(("T", "first", "count"), [(3, 1, 1), (12, 6, 6), (30, 10, 10)])
def test_an_own_expert_of_some_tokens_on_the_host(
    monkeypatch: pytest.MonkeyPatch, T: int, first: int, count: int
) -> None:
    """As a rank has it beside tokens of others, most of whose experts are elsewhere."""
    monkeypatch.setattr(cuda_int4, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda_int4, "tensor_map", host_tensor_map)
    monkeypatch.setattr(cuda_int4, "multiprocessors", lambda device: 3)
    case = moe_case_int4(T, 256, 256, 5, 2, torch.bfloat16, seed=T, own=256)
    check_left_out(replace(case, own=None), own_beside(case, (first, count)), 0.004)


@pytest.mark.parametrize(("tokens", "own"), [(1, 1), (8, 8), (MAX_TOKENS, MAX_TOKENS), (MAX_TOKENS, 8)])
@pytest.mark.parametrize(
    ("gated", "columns", "rows"),
    [(1, 7168, 2048), (0, 2048, 7168), (1, 7168, 256), (0, 256, 7168), (1, 2304, 256)],
)
def test_they_compile_for_hopper(tmp_path: Path, tokens: int, own: int, gated: int, columns: int, rows: int) -> None:
    cut = geometry(columns, 384, 8, tokens)
    assert cut is not None
    macros = {"GATED": gated, "COLS": columns, "OUT": rows, "OWN": own, "TOKENS": tokens}
    compiled = compile_cuda(SOURCE, tmp_path, E=384, K=8, ENDS=int(own == tokens), **macros, **cut.macros)
    assert compiled.spilled_bytes <= 160  # of a pass, not of an item
    per_partition = -(-(cut.warps + 2) * cut.blocks // 4)  # warps of a quarter of a multiprocessor
    assert per_partition * compiled.registers * 32 <= 16384
    assert compiled.static_shared_bytes <= static_bytes(384, 8, tokens)
    assert cut.blocks * (cut.shared_bytes + compiled.static_shared_bytes + 1024) <= 228 * 1024


def test_they_start_the_kernel_behind_after_their_own_wait() -> None:
    """Down reads ids before its wait: gate_up, which it is behind, must not let it start before its own."""
    gated = SOURCE.read_text().split("#if GATED\n    wait_for_kernel_ahead();")[1]
    assert gated.index("start_kernel_behind()") < gated.index("wait_for_kernel_ahead()")


def test_columns_are_shared_out_whole() -> None:
    for tokens in (1, 8, 64):
        cuts = [geometry(columns, 384, 8, tokens) for columns in (7168, 2048, 1024, 256)]
        assert [cut and (cut.warps, cut.blocks) for cut in cuts] == [(28, 1), (8, 3), (4, 3), (1, 3)]
        assert [geometry(columns, 384, 8, tokens) for columns in (0, 128, 200, 384, 256 * 29)] == [None] * 5


@pytest.mark.parametrize("E", [1, 256, 384, 1024])
@pytest.mark.parametrize("columns", range(256, 7168 + 1, 256))
def test_all_columns_that_they_serve_have_a_cut(monkeypatch: pytest.MonkeyPatch, columns: int, E: int) -> None:
    monkeypatch.setattr(cuda_build, "why_not", lambda where: None)
    monkeypatch.setattr(experts, "why_not", lambda where: None)
    monkeypatch.setattr(experts, "why_not_hopper", lambda: None)
    resolver = Resolver()
    resolver.resolve(EXPERTS, Where("cuda", "bfloat16"), ExpertsDims(E=E, D=columns, I=columns, scheme="int4"))
    assert "cuda" not in dict(resolver.explain()[0].refused)
    for tokens in (1, 8, MAX_TOKENS):
        for K in (1, 8, 32):
            cut = geometry(columns, E, K, tokens)
            assert cut is not None
            assert cut.warps * cuda_int4.INT4_COLUMNS == columns
            assert cut.stages >= 2
            assert cut.blocks * (cut.shared_bytes + static_bytes(E, K, tokens) + 1024) <= 228 * 1024


@pytest.mark.parametrize(
    ("dims", "dtype", "reason"),
    [
        ({**DIMS, "E": 1025}, "bfloat16", "at most 1024 experts, not 1025"),
        ({**DIMS, "D": 200}, "bfloat16", "multiple of 256 up to 7168, not 200 and 2048"),
        ({**DIMS, "own": 1024}, "bfloat16", "an own expert as wide as the others, 2048, not 1024"),
        (DIMS, "float32", "needs bfloat16, not float32"),
    ],
)
def test_what_they_do_not_serve_they_refuse_with_a_reason(dims: dict[str, Any], dtype: str, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(EXPERTS, Where("cuda", dtype), ExpertsDims(**dims))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]
