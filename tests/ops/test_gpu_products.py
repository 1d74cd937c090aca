"""Experts and float8 linears at the matrix unit's rate, on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.fp8_linear_case import draw, expected
from tests.ops.moe_case import (
    MoeCase,
    check_chained_in_a_graph,
    check_sort,
    experts_in_float64,
    in_float8,
    moe_case,
    moe_case_fp8,
    rmse_ratio,
)
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, LINEAR_FP8, NORM_LINEAR_FP8, Fp8LinearDims
from thalweg.ops.moe.experts import EXPERTS, Experts
from thalweg.ops.products.triton import quantize_rows
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu
WHERE = Where("cuda", "bfloat16")


def experts_of(case: MoeCase) -> Experts:
    name = "matrix" if case.scheme == "none" else "w8a8"
    return Resolver({"experts": name}).resolve(EXPERTS, WHERE, case.dims)


def case_of(scheme: str, T: int, D: int, I: int, E: int, k: int, shared: int, seed: int = 0) -> MoeCase:
    make: Any = moe_case if scheme == "none" else moe_case_fp8
    return make(T, D, I, E, k, shared, torch.bfloat16, "cuda", seed)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("scheme", "tolerance"), [("none", 0.005), ("fp8", 0.05)])
@pytest.mark.parametrize("T", [1, 17, 300, 1000])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (384, 640, 5, 3, 0), (2304, 1024, 16, 8, 1)]
)
def test_experts(scheme: str, tolerance: float, T: int, D: int, I: int, E: int, k: int, shared: int) -> None:
    case = case_of(scheme, T, D, I, E, k, shared, seed=T)
    quantized = in_float8 if scheme == "fp8" else None  # by itself it costs a single token up to 0.07
    expected = experts_in_float64(case, quantized=quantized)
    assert rmse_ratio(case.run(experts_of(case)), expected) < tolerance


@pytest.mark.parametrize(
    ("T", "E", "k", "shared"),
    [(1, 5, 2, 0), (300, 64, 3, 0), (1024, 256, 8, 1), (8191, 512, 10, 1), (16384, 256, 8, 1), (9000, 1279, 16, 1)],
)
def test_sort(T: int, E: int, k: int, shared: int) -> None:
    check_sort(moe_case(T, 8, 8, E, k, shared, torch.bfloat16, "cuda", seed=T).ids, E + shared, 320)


@pytest.mark.parametrize("scheme", ["none", "fp8"])
def test_all_tokens_with_the_same_few(scheme: str) -> None:
    case = case_of(scheme, 2000, 256, 128, 64, 4, 1)
    case.ids[:, :4] = torch.arange(4, device="cuda")
    assert rmse_ratio(case.run(experts_of(case)), experts_in_float64(case)) < 0.05


@pytest.mark.parametrize("scheme", ["none", "fp8"])
def test_nan_stays_in_its_row(scheme: str) -> None:
    case = case_of(scheme, 700, 256, 128, 32, 4, 1)
    case.x[5] = torch.nan
    assert case.run(experts_of(case), residual_TD=case.residual).isnan().any(1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("scheme", ["none", "fp8"])
def test_a_row_does_not_depend_on_its_neighbours(scheme: str) -> None:
    case = case_of(scheme, 700, 512, 256, 16, 4, 1)
    op = experts_of(case)
    y = case.run(op)
    case.x[:350] = 0
    case.ids[:350] = case.ids[0]
    assert torch.equal(case.run(op)[350:], y[350:])


@pytest.mark.parametrize("scheme", ["none", "fp8"])
def test_chained_in_a_graph(scheme: str) -> None:
    layers = [case_of(scheme, 600, 512, 256, 64, 8, 1, seed=i) for i in range(6)]
    check_chained_in_a_graph(layers, experts_of(layers[0]), replays=20)


@pytest.mark.parametrize("T", [257, 300, 1000])
@pytest.mark.parametrize(("D", "O", "rest"), [(256, 40, 0), (1536, 576, 64), (7168, 2112, 0), (2304, 12672, 0)])
def test_linears(T: int, D: int, O: int, rest: int) -> None:
    case = draw(T, D, O, torch.bfloat16, rest=rest, device="cuda")
    dims = Fp8LinearDims(D=D, O=O, rest=rest)
    weight = (case.q_OD, case.scale_OB, *([case.rest_RD] if rest else []))
    resolver = Resolver({op.name: "w8a8" for op in (LINEAR_FP8, NORM_LINEAR_FP8, LINEAR_ADD_FP8)})
    y = resolver.resolve(LINEAR_FP8, WHERE, dims)(case.x_TD, *weight)
    assert rmse_ratio(y, expected(case, rest=rest > 0)) < 0.03
    y = resolver.resolve(NORM_LINEAR_FP8, WHERE, dims)(case.x_TD, case.norm_D, 1e-5, *weight)
    assert rmse_ratio(y, expected(case, norm=True, rest=rest > 0)) < 0.03
    if not rest:
        wanted = expected(case, residual=case.residual_TO)  # which is overwritten
        y = resolver.resolve(LINEAR_ADD_FP8, WHERE, dims)(case.x_TD, *weight, case.residual_TO)
        assert rmse_ratio(y, wanted) < 0.03


@pytest.mark.parametrize("normed", [False, True])
def test_quantized_rows(normed: bool) -> None:
    """As torch's conversion rounds them; NaN and infinity stay in their row, zeros are zeros."""
    x = torch.randn(300, 1152, device="cuda").bfloat16()[:, :1024]
    x[0] *= 2.0**60
    x[1, :128], x[2, 5], x[3, 7] = 0, torch.nan, torch.inf
    norm = (torch.rand(1024, device="cuda") + 0.5).bfloat16()
    of_weights = torch.rand(300, 8, device="cuda")
    q, scales_T, weights_BO = quantize_rows(x, of_weights, (norm, 1e-5) if normed else None)
    assert torch.equal(weights_BO[:, :300].T, of_weights)
    scales = scales_T[:300]
    y = torch.nn.functional.rms_norm(x.float(), (1024,), norm.float(), 1e-5).bfloat16().float() if normed else x.float()
    back = q.float() * scales[:, None]
    assert back.isnan().any(1).nonzero().flatten().tolist() == [2, 3]
    good = [i for i in range(300) if i not in (2, 3)]
    assert rmse_ratio(back[good], y[good]) < 0.03
    assert (back[1, :128] == 0).all()
    largest = y[good].abs().amax(-1)
    torch.testing.assert_close(scales[good], largest.clamp(min=2.0**-100) / 448, rtol=1e-2, atol=0)
