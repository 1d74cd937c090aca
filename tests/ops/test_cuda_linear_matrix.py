"""Projections of up to 128 tokens by the matrix unit of warpgroups: on the host, compiled for Hopper, how they are cut.
On a GPU: test_gpu_linear_matrix."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import rmse_ratio
from tests.ops.run_on_host import HostKernel, host_tensor_map

MATRIX = pytest.importorskip("thalweg.ops.linear.matrix", exc_type=ImportError)


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four stages, so that the ring comes round."""
    monkeypatch.setattr(MATRIX, "cuda_kernel", HostKernel)
    monkeypatch.setattr(MATRIX, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(MATRIX, "tensor_map", host_tensor_map)
    monkeypatch.setattr(MATRIX, "MAX_STAGES", 4)


@pytest.mark.parametrize(
    ("T", "O", "D", "rows", "add"),
    [
        (17, 200, 200, 72, False),  # three tiles of two blocks, a last one that is shorter, columns to spare
        (33, 72, 320, 104, True),
        (5, 64, 640, 8, True),
        (20, 40, 448, 40, False),  # warpgroups share out the steps
    ],
)
def test_products_on_the_host(on_host: None, T: int, O: int, D: int, rows: int, add: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(T, D + 8).bfloat16()[:, :D], torch.randn(O, D).bfloat16()
    residual = torch.randn(T, O + 3).bfloat16()[:, :O] if add else None
    out = torch.full((T, O + 8), torch.nan).bfloat16()
    y = MATRIX.some_tokens(x, w, residual, out[:, :O], how=MATRIX.Cut(rows, 1, False))
    assert y.data_ptr() == out.data_ptr()
    wanted = x.double() @ w.double().T
    assert rmse_ratio(y, wanted if residual is None else wanted + residual.double()) < 0.003
    assert out[:, O:].isnan().all()


def test_a_copy_that_comes_last_is_waited_for(on_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warpgroups share out steps: none may take a stage again before another has had what is still on its way there."""
    monkeypatch.setattr(MATRIX, "cuda_kernel", partial(HostKernel, LATE=100))
    monkeypatch.setattr(MATRIX, "MAX_STAGES", 7)
    torch.manual_seed(0)
    x, w = torch.randn(20, 1280).bfloat16(), torch.randn(40, 1280).bfloat16()
    y = MATRIX.some_tokens(x, w, how=MATRIX.Cut(40, 1, False))
    assert rmse_ratio(y, x.double() @ w.double().T) < 0.003


@pytest.mark.parametrize(("units", "split", "pair", "add"), [(2, 1, 0, 1), (8, 1, 1, 0), (8, 2, 0, 1), (6, 1, 0, 0)])
def test_it_compiles_for_hopper(tmp_path: Path, units: int, split: int, pair: int, add: int) -> None:
    compiled = compile_cuda(MATRIX.SOURCE, tmp_path, UNITS=units, SPLIT=split, PAIR=pair, ADD=add, GATED=0)
    assert compiled.spilled_bytes == 0
    assert compiled.registers <= 128  # of 14 warps, four to a quarter of the multiprocessor


def test_any_shape_is_cut_into_what_fits() -> None:
    for O in (8, 2048, 4096, 8448, 12352, 24576, 248320):
        cut = MATRIX.cut(O, 132)
        assert cut.rows % 8 == 0
        assert cut.rows <= 64 * MATRIX.GROUPS
        assert cut.split == 1 or -(-O // cut.rows) * cut.split <= 132  # one round
        for tokens in (32, 48, 64, 96, 128):
            stages, shared = MATRIX.shared_bytes(cut, tokens)
            assert 2 <= stages <= MATRIX.MAX_STAGES
            assert shared <= 227 * 1024


def test_constants_are_those_of_the_source() -> None:
    source = MATRIX.SOURCE.read_text()
    assert f"STEP_BYTES = {MATRIX.STEP_BYTES}, " in source
    assert f"MAX_STAGES = {MATRIX.MAX_STAGES};" in source
    assert f"GROUPS = {MATRIX.GROUPS}, " in source
    assert f"PITCH = {MATRIX.PITCH};" in source
