"""Linears over float8 of some tokens by warpgroups, with x in float8, on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops.fp8_linear_case import draw, expected
from tests.ops.moe_case import rmse_ratio
from tests.ops.replays import check_replays
from tests.ops.test_gpu_linear_fp8 import resolved
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, LINEAR_FP8, NORM_LINEAR_FP8

pytestmark = pytest.mark.gpu
TOLERANCE = 0.035  # of one row; of all 0.03


@pytest.mark.parametrize("T", [1, 17, 32, 48, 64, 96, 128])
@pytest.mark.parametrize(
    ("D", "O", "rest"), [(2048, 12288, 64), (2048, 9216, 0), (1920, 16384, 0), (128, 40, 8), (7168, 2112, 0)]
)
@pytest.mark.parametrize("norm_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products(T: int, D: int, O: int, rest: int, norm_dtype: torch.dtype) -> None:
    case = draw(T, D, O, torch.bfloat16, rest=rest, device="cuda", norm_dtype=norm_dtype)
    weight = (case.q_OD, case.scale_OB, *([case.rest_RD] if rest else []))
    for norm in (False, True):
        torch.full((T, O + rest), torch.nan, device="cuda", dtype=torch.bfloat16)  # the output's memory, likely
        if norm:
            y = resolved(NORM_LINEAR_FP8, "matrix", D, O, rest)(case.x_TD, case.norm_D, 1e-5, *weight)
        else:
            y = resolved(LINEAR_FP8, "matrix", D, O, rest)(case.x_TD, *weight)
        wanted = expected(case, norm=norm, rest=rest > 0)
        assert y.shape == (T, O + rest)
        assert rmse_ratio(y[:, :O], wanted[:, :O]) < TOLERANCE
        if rest:  # of x as it is
            assert rmse_ratio(y[:, O:], wanted[:, O:]) < 0.005


@pytest.mark.parametrize("T", [1, 17, 32, 33, 64])
@pytest.mark.parametrize(("D", "O"), [(4096, 2048), (2304, 4096), (2048, 2304), (256, 8), (3584, 16384)])
def test_with_a_residual(T: int, D: int, O: int) -> None:
    case = draw(T, D, O, torch.bfloat16, device="cuda")
    case.x_TD[0] *= 2.0**30
    case.x_TD[-1] *= 2.0**-30
    case.residual_TO.zero_()
    case.residual_TO[:, ::3] = 2
    y = resolved(LINEAR_ADD_FP8, "matrix", D, O)(case.x_TD, case.q_OD, case.scale_OB, case.residual_TO)
    wanted = expected(case)
    error = y.double() - wanted - case.residual_TO.double()
    bound = TOLERANCE * wanted.norm(dim=1) + 0.004 * y.double().norm(dim=1)
    assert (error.norm(dim=1) <= bound * (2 if O < 100 else 1)).all()


def test_a_row_that_is_not_finite_stays_alone() -> None:
    case = draw(20, 2048, 264, torch.bfloat16, rest=8, device="cuda")
    multiply = resolved(NORM_LINEAR_FP8, "matrix", 2048, 264, 8)
    weight = (case.norm_D, 1e-5, case.q_OD, case.scale_OB, case.rest_RD)
    clean = multiply(case.x_TD, *weight)
    case.x_TD[1, 1500] = torch.nan
    y = multiply(case.x_TD, *weight)
    others = torch.arange(20, device="cuda") != 1
    assert torch.equal(y[others], clean[others])
    assert y[1].isnan().all()


@pytest.mark.parametrize("T", [17, 40])
def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote(T: int) -> None:
    D, O = 2048, 4096
    cases = [draw(T, D, O, torch.bfloat16, rest=64, device="cuda", seed=i) for i in range(6)]
    backs = [draw(T, O, D, torch.bfloat16, device="cuda", seed=i) for i in range(6)]
    norm_linear = resolved(NORM_LINEAR_FP8, "matrix", D, O, 64)
    linear_add = resolved(LINEAR_ADD_FP8, "matrix", O, D)

    def chain(wait: Callable[[], None]) -> torch.Tensor:
        x = cases[0].x_TD.clone()
        for case, back in zip(cases, backs, strict=True):
            h = norm_linear(x, case.norm_D, 1e-5, case.q_OD, case.scale_OB, case.rest_RD)
            wait()
            x = linear_add(h[:, :O], back.q_OD, back.scale_OB, x)
            wait()
        return x

    check_replays(chain)
