"""Experts in int4 at matrix rate: on the host, and compiled for Hopper. On a GPU: test_gpu_moe_int4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import moe_case_int4, rmse_ratio
from tests.ops.run_on_host import HostKernel
from thalweg.ops.moe.experts.sort import Groups
from thalweg.quant import INT4_EXPERTS

pytest.importorskip("triton")


def ordered(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, 4, 4, 2, 2, 2)).permute(0, 1, 3, 5, 6, 2, 4).reshape(x.shape)


@pytest.mark.parametrize("T", [3, 40, pytest.param(100, marks=pytest.mark.slow)])
def test_products_on_the_host(monkeypatch: pytest.MonkeyPatch, T: int) -> None:
    from thalweg.ops.moe.experts import matrix_int4

    monkeypatch.setattr(matrix_int4, "cuda_kernel", HostKernel)
    case = moe_case_int4(T, 256, 128, 3, 2, torch.bfloat16, seed=T)
    E, k = 3, 2
    expert_P = case.ids.flatten()
    sorted_P = expert_P.argsort(stable=True).int()
    counts = torch.bincount(expert_P, minlength=E).tolist()
    blocks, first = [], 0
    for e, count in enumerate(counts):
        blocks.append((e, first, count))
        first += count
    groups = Groups(sorted_P, torch.tensor([*blocks, (0, 0, 0)], dtype=torch.int32), 128)
    h, y = torch.full((T * k, 128), torch.nan).bfloat16(), torch.full((T * k, 256), torch.nan).bfloat16()
    matrix_int4.product(ordered(case.x), groups, case.gate_up, h, gated=True, share=k)
    w = INT4_EXPERTS.widened(case.gate_up, 2, torch.bfloat16).double()
    x = case.x.double()[(sorted_P // k).long()]
    gate, up = torch.einsum("pd,pod->po", x, w[expert_P[sorted_P.long()]]).chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up
    assert rmse_ratio(h, ordered(wanted)) < 0.005
    matrix_int4.product(h, groups, case.down, y, gated=False, share=1)
    w = INT4_EXPERTS.widened(case.down, 1, torch.bfloat16).double()
    natural = torch.empty_like(h)
    natural[:, ordered(torch.arange(128)[None])[0]] = h
    wanted = torch.empty(T * k, 256, dtype=torch.float64)
    wanted[sorted_P.long()] = torch.einsum("pd,pod->po", natural.double(), w[expert_P[sorted_P.long()]])
    assert rmse_ratio(y, wanted) < 0.005


@pytest.mark.parametrize(("gated", "columns", "rows"), [(1, 7168, 2048), (0, 2048, 7168)])
def test_they_compile_for_hopper(tmp_path: Path, gated: int, columns: int, rows: int) -> None:
    from thalweg.ops.moe.experts.matrix_int4 import SOURCE, STAGES

    compiled = compile_cuda(SOURCE, tmp_path, GATED=gated, COLS=columns, OUT=rows, STAGES=STAGES)
    assert compiled.spilled_bytes == 0
