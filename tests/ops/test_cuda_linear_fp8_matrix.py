"""Projections of up to 128 tokens over float8 by the matrix unit of warpgroups: on the host, and compiled for Hopper.
On a GPU: test_gpu_linear_fp8_matrix."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.compile_cuda import compile_cuda
from tests.ops.fp8_linear_case import draw, expected
from tests.ops.moe_case import rmse_ratio
from tests.ops.run_on_host import HostKernel, host_tensor_map
from thalweg.ops.norm.reference import rms_norm

MATRIX = pytest.importorskip("thalweg.ops.linear.fp8.matrix", exc_type=ImportError)


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of at most seven stages, so that the ring comes round."""
    monkeypatch.setattr(MATRIX, "cuda_kernel", HostKernel)
    monkeypatch.setattr(MATRIX, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(MATRIX, "tensor_map", host_tensor_map)
    monkeypatch.setattr(MATRIX, "MAX_STAGES", 7)
    monkeypatch.setattr(MATRIX, "quantize_rows", quantized)
    monkeypatch.setattr(MATRIX, "rms_norm", rms_norm)


def quantized(x_TD: Tensor, _: None, norm: tuple[Tensor, float] | None) -> tuple[Tensor, Tensor, None]:
    """In plain torch, for where there is no Triton."""
    x_TD = (x_TD if norm is None else rms_norm(x_TD, *norm)).float()
    scale_T = x_TD.abs().amax(1).clamp(min=2.0**-100) / 448
    return (x_TD / scale_T[:, None]).to(torch.float8_e4m3fn), scale_T, None


@pytest.mark.parametrize(
    ("T", "D", "O", "rest", "norm", "add"),
    [
        (17, 1280, 200, 24, torch.float32, False),  # two warpgroups have rows
        (33, 1152, 40, 8, torch.bfloat16, False),  # all share out the steps
        (5, 1024, 328, 0, None, True),  # three warpgroups have rows
        (20, 640, 72, 8, None, False),
        (20, 128, 40, 0, None, True),  # fewer steps than warpgroups
    ],
)
def test_products_on_the_host(
    on_host: None,
    T: int,
    D: int,
    O: int,
    rest: int,
    norm: torch.dtype | None,
    add: bool,
) -> None:
    case = draw(T, D, O, torch.bfloat16, rest=rest, norm_dtype=norm)
    case.x_TD[0] *= 2.0**30
    case.x_TD[-1] *= 2.0**-30
    weight = (case.q_OD, case.scale_OB)
    if add:
        y = MATRIX.linear_add_fp8(case.x_TD, *weight, case.residual_TO)
    elif norm is None:
        y = MATRIX.linear_fp8(case.x_TD, *weight, case.rest_RD if rest else None)
    else:
        y = MATRIX.norm_linear_fp8(case.x_TD, case.norm_D, 1e-5, *weight, case.rest_RD if rest else None)
    wanted = expected(case, norm=norm is not None, rest=rest > 0, residual=case.residual_TO if add else None)
    assert all(rmse_ratio(a, b) < 0.06 for a, b in zip(y, wanted, strict=True))
    assert all(rmse_ratio(y[i::4], wanted[i::4]) < 0.035 for i in range(1, 4))
    if rest:  # of x as it is
        assert rmse_ratio(y[:, O:], wanted[:, O:]) < 0.005


@pytest.mark.parametrize(("T", "D", "O"), [(17, 1280, 200), (96, 1024, 328), (20, 640, 72)])
def test_scales_of_128_columns_on_the_host(on_host: None, T: int, D: int, O: int) -> None:
    case = draw(T, D, O, torch.bfloat16)
    case.x_TD[:, :128] *= 2.0**20  # what a scale of the whole row would lose beside
    case.q_OD[::2, :128] = 0  # or nothing else would be seen beside
    x_TBC = case.x_TD.reshape(T, -1, 128).float()
    scale_TB = x_TBC.abs().amax(2) / 448
    narrow_TD = (x_TBC / scale_TB[:, :, None]).to(torch.float8_e4m3fn).view(T, D)
    y = torch.full((T, O), torch.nan, dtype=torch.bfloat16)
    x = (narrow_TD, torch.nn.functional.pad(scale_TB.T, (0, -T % 16), value=torch.nan).contiguous())
    MATRIX.multiply_float8(x, case.q_OD, case.scale_OB, y, case.residual_TO.contiguous())
    narrow = (narrow_TD.double().view(T, -1, 128) * scale_TB[:, :, None].double()).view(T, D)
    plain = case.q_OD.double() * case.scale_OB.double().repeat_interleave(128, 1)
    wanted = narrow @ plain.T + case.residual_TO.double()
    assert all(rmse_ratio(y[:, i::2], wanted[:, i::2]) < 0.005 for i in range(2))


def test_a_rest_of_many_tokens_has_blocks_of_some_each(on_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MATRIX, "multiprocessors", lambda device: 24)
    case = draw(70, 1152, 120, torch.bfloat16, rest=24, norm_dtype=torch.float32)
    weight = (case.q_OD, case.scale_OB, case.rest_RD)
    y = MATRIX.norm_linear_fp8(case.x_TD, case.norm_D, 1e-5, *weight)
    wanted = expected(case, norm=True, rest=True)
    assert all(rmse_ratio(y[t, :120], wanted[t, :120]) < 0.06 for t in range(70))
    assert all(rmse_ratio(y[t, 120:], wanted[t, 120:]) < 0.01 for t in range(70))


def test_a_copy_that_comes_last_is_waited_for(on_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warpgroups share out steps: none may take a stage again before another has had what is still on its way there."""
    monkeypatch.setattr(MATRIX, "cuda_kernel", partial(HostKernel, LATE=100))
    case = draw(20, 1920, 40, torch.bfloat16)
    y = MATRIX.linear_fp8(case.x_TD, case.q_OD, case.scale_OB)
    assert rmse_ratio(y, expected(case)) < 0.035


@pytest.mark.parametrize(
    ("units", "groups", "split"), [(2, 4, 1), (4, 3, 1), (4, 3, 2), (6, 3, 1), (8, 2, 1), (8, 2, 2)]
)
def test_it_compiles_for_hopper(tmp_path: Path, units: int, groups: int, split: int) -> None:
    macros = dict(UNITS=units, GROUPS=groups, SPLIT=split)
    forms = [dict(ADD=1, X_BLOCKS=0, REST=0), dict(ADD=1, X_BLOCKS=1, REST=0)]
    for more in (*forms, *([dict(ADD=0, X_BLOCKS=0, REST=1, NORM=2)] if split == 1 else [])):
        compiled = compile_cuda(MATRIX.SOURCE, tmp_path, **macros, **more)
        assert compiled.spilled_bytes == 0
        assert compiled.registers <= {2: 168, 3: 128, 4: 96}[groups]  # of 9, 13 or 17 warps in four quarters


def test_any_shape_is_cut_into_what_fits() -> None:
    for T in (17, 64, 65, 128):
        for D, O in ((2048, 12288), (4096, 2048), (7168, 2112), (16384, 16384), (128, 8), (384, 16384)):
            cut = MATRIX.cut(T, D, O, 132)
            assert cut.shared_bytes <= MATRIX.SHARED
            assert cut.rows <= 64 * cut.groups
            assert -(-O // cut.rows) * cut.split <= 132  # one round
            phases, steps = cut.groups // -(-cut.rows // 64), D // cut.split // 128
            assert cut.stages == steps or cut.stages % phases == 0  # each warpgroup has stages of its own
            assert cut.stages == steps or cut.stages >= 4
            blocks = MATRIX.cut(T, D, O, 132, True)
            assert blocks.shared_bytes <= MATRIX.SHARED
