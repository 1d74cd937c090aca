"""Projections of some tokens in one launch on the device, over weights in bf16 and in float8."""

from __future__ import annotations

import pytest
import torch

from tests.ops.fp8_linear_case import draw, expected
from tests.ops.moe_case import rmse_ratio
from thalweg.ops.linear.triton import splits

pytestmark = pytest.mark.gpu
SHAPES = [(7168, 2112), (1536, 12288), (8192, 7168), (4096, 1000), (128, 40), (2048, 130)]


@pytest.mark.parametrize("T", [1, 9, 16, 17, 33, 64])
@pytest.mark.parametrize(("D", "O"), SHAPES)
@pytest.mark.parametrize("float8", [False, True])
def test_products(T: int, D: int, O: int, float8: bool) -> None:
    """The same bits whoever comes last; no place beside the result is written."""
    case = draw(T, D, O, torch.bfloat16, device="cuda")
    weight = case.q_OD, case.scale_OB
    if not float8:
        case.scale_OB.fill_(2**-9)
        weight = (case.q_OD.float() * 2**-9).bfloat16(), None
    norm = case.norm_D, 1e-5
    for residual, normed in ((None, None), (case.residual_TO, None), (None, norm)):
        out = torch.full((T, O + 5), torch.nan, dtype=torch.bfloat16, device="cuda")
        y = splits.product(case.x_TD, *weight, residual, out[:, :O], normed)
        assert rmse_ratio(y, expected(case, residual=residual, norm=normed is not None)) < (0.04 if float8 else 0.005)
        assert out[:, O:].isnan().all()
        first = y.clone()
        for _ in range(20):
            assert torch.equal(splits.product(case.x_TD, *weight, residual, out[:, :O], normed), first)


@pytest.mark.parametrize("float8", [False, True])
def test_a_row_that_is_not_finite_stays_alone(float8: bool) -> None:
    case = draw(40, 4096, 136, torch.bfloat16, device="cuda")
    weight = (case.q_OD, case.scale_OB) if float8 else (case.q_OD.bfloat16(), None)
    clean = splits.product(case.x_TD, *weight, norm=(case.norm_D, 1e-5))
    case.x_TD[1, 3000] = torch.nan
    y = splits.product(case.x_TD, *weight, norm=(case.norm_D, 1e-5))
    others = torch.arange(40, device="cuda") != 1
    assert torch.equal(y[others], clean[others])
    assert y[1].isnan().all()


@pytest.mark.parametrize("float8", [False, True])
def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote(float8: bool) -> None:
    T, D = 40, 4096
    cases = [draw(T, D, D, torch.bfloat16, device="cuda", seed=i) for i in range(6)]

    def chain(wait: bool) -> torch.Tensor:
        x = cases[0].x_TD.clone()
        for case in cases:
            weight = (case.q_OD, case.scale_OB) if float8 else ((case.q_OD.float() * 2**-9).bfloat16(), None)
            h = splits.product(x, *weight, norm=(case.norm_D, 1e-5))
            if wait:
                torch.cuda.synchronize()
            x = splits.product(h, *weight, x)
            if wait:
                torch.cuda.synchronize()
        return x

    wanted = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(30):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, wanted)
