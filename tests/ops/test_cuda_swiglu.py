"""Gate and up of few and some tokens with SiLU in one launch: on the host, compiled for Hopper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import rmse_ratio
from tests.ops.run_on_host import HostKernel, host_tensor_map

FEW = pytest.importorskip("thalweg.ops.linear.cuda", exc_type=ImportError)
SOME = pytest.importorskip("thalweg.ops.linear.matrix", exc_type=ImportError)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (FEW, SOME):
        monkeypatch.setattr(module, "cuda_kernel", HostKernel)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(SOME, "tensor_map", host_tensor_map)
    monkeypatch.setattr(SOME, "MAX_STAGES", 4)


def wanted(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    gate, up = (x_TD.double() @ w_OD.double().T).chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize(("T", "D", "I"), [(1, 4128, 65), (3, 288, 19), (11, 992, 29), (17, 2304, 20)])
def test_few_tokens(T: int, D: int, I: int) -> None:
    torch.manual_seed(0)
    x, w, norm = torch.randn(T, D + 8).bfloat16()[:, :D], torch.randn(2 * I, D).bfloat16() / D**0.5, torch.rand(D) + 0.5
    y = FEW.few_tokens(x, w, (norm, 1e-5), gated=True)
    assert y.shape == (T, I)
    assert rmse_ratio(y, wanted(F.rms_norm(x.double(), (D,), norm.double(), 1e-5), w)) < 0.006


@pytest.mark.parametrize(
    ("T", "D", "I", "rows"),
    [(17, 200, 200, 144), (33, 320, 40, 32), (20, 448, 72, 112), (5, 640, 8, 16), (100, 136, 40, 48)],
)
def test_some_tokens(T: int, D: int, I: int, rows: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(T, D).bfloat16(), torch.randn(2 * I, D).bfloat16() / D**0.5
    y = SOME.some_tokens(x, w, how=SOME.Cut(rows, 1, False), gated=True)
    assert y.shape == (T, I)
    assert rmse_ratio(y, wanted(x, w)) < 0.005


def test_it_compiles_for_hopper(tmp_path: Path) -> None:
    cut = FEW.tiling(188, 4096, 8, norm_bytes=2)
    macros = dict(D=4096, PASS=cut.columns, WARPS=FEW.WARPS, TOKENS=8, ROWS=cut.rows, NORM=1, ADD=0, GATED=1)
    assert compile_cuda(FEW.SOURCE, tmp_path, **macros).spilled_bytes == 0
    for units, split in ((2, 1), (8, 1), (8, 2)):
        compiled = compile_cuda(SOME.SOURCE, tmp_path, UNITS=units, SPLIT=split, PAIR=0, ADD=0, GATED=1)
        assert compiled.spilled_bytes == 0
        assert compiled.registers <= 128
