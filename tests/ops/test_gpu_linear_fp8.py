"""Ops "linear_fp8", "norm_linear_fp8" and "linear_add_fp8" on the device, and wide rows in bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops.fp8_linear_case import draw, expected
from tests.ops.moe_case import rmse_ratio
from tests.ops.replays import check_replays
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, LINEAR_FP8, NORM_LINEAR_FP8, Fp8LinearDims
from thalweg.ops.registry import Op, Resolver, Where

pytestmark = pytest.mark.gpu
TOLERANCE = 0.005
TOKENS = [0, 1, 2, 7, 8, 9, 16, 17, 33, 64, 300, 1000]
SHAPES = [(7168, 2112, 64), (1536, 576, 0), (8192, 1024, 1), (2304, 7168, 0), (128, 40, 96), (18432, 264, 0)]


def resolved(op: Op[Any, Any], implementation: str, D: int, O: int, rest: int = 0) -> Callable[..., torch.Tensor]:
    dims = Fp8LinearDims(D=D, O=O, rest=rest)
    return Resolver({op.name: implementation}).resolve(op, Where("cuda", "bfloat16"), dims)  # type: ignore[no-any-return]


def check(implementation: str, T: int, D: int, O: int, rest: int, norm_dtype: torch.dtype = torch.bfloat16) -> None:
    case = draw(T, D, O, torch.bfloat16, rest=rest, device="cuda", norm_dtype=norm_dtype)
    weight = (case.q_OD, case.scale_OB, *([case.rest_RD] if rest else []))

    def poisoned() -> None:
        torch.full((max(T, 1), O + rest), torch.nan, device="cuda", dtype=torch.bfloat16)  # the output's memory, likely

    poisoned()
    y = resolved(LINEAR_FP8, implementation, D, O, rest)(case.x_TD, *weight)
    assert y.shape == (T, O + rest)
    assert y.is_contiguous()
    if T == 0:
        return
    assert rmse_ratio(y, expected(case, rest=rest > 0)) < TOLERANCE
    if D <= 16384:
        poisoned()
        y = resolved(NORM_LINEAR_FP8, implementation, D, O, rest)(case.x_TD, case.norm_D, 1e-5, *weight)
        assert rmse_ratio(y, expected(case, norm=True, rest=rest > 0)) < TOLERANCE
    wanted = expected(case, residual=case.residual_TO)
    poisoned()
    y = resolved(LINEAR_ADD_FP8, implementation, D, O)(case.x_TD, *weight[:2], case.residual_TO)
    assert rmse_ratio(y, wanted) < TOLERANCE


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("D", "O", "rest"), SHAPES)
def test_products(T: int, D: int, O: int, rest: int) -> None:
    check("cuda" if T <= 16 else "triton", T, D, O, rest)  # W8A8, which serves more, has its own tests


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("D", "O", "rest"), [(7168, 2112, 64), (1536, 576, 0), (64, 200, 1), (4352, 2113, 0)])
def test_products_in_triton(T: int, D: int, O: int, rest: int) -> None:
    check("triton", T, D, O, rest)


@pytest.mark.parametrize(
    ("implementation", "T"), [("cuda", 1), ("cuda", 16), ("triton", 1), ("triton", 16), ("triton", 40)]
)
def test_a_norm_with_its_weight_in_fp32(implementation: str, T: int) -> None:
    check(implementation, T, 5120, 1000, 96, torch.float32)


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("scale", [1e-12, 3e4])
def test_scales_of_any_size(implementation: str, scale: float) -> None:
    case = draw(9, 1024, 264, torch.bfloat16, device="cuda")
    scales = case.scale_OB * scale / case.scale_OB.mean()
    y = resolved(LINEAR_FP8, implementation, 1024, 264)(case.x_TD, case.q_OD, scales)
    w = case.q_OD.double() * scales.double().repeat_interleave(128, 1)
    assert rmse_ratio(y, case.x_TD.double() @ w.T) < TOLERANCE


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_every_float8_is_widened_exactly(implementation: str) -> None:
    """Subnormal ones and both zeros too: a row of x picks one of them, and scales are 1."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = values[values.float().isfinite()].cuda()
    q = finite.repeat(2)[: 8 * 63].view(8, 63)
    q = torch.nn.functional.pad(q.view(torch.uint8), (0, 65)).view(torch.float8_e4m3fn)
    x = torch.eye(128, device="cuda").bfloat16()[:63]
    multiply = resolved(LINEAR_FP8, implementation, 128, 8)
    y = torch.cat([multiply(rows, q, torch.ones(8, 1, device="cuda")) for rows in x.split(16)])
    assert torch.equal(y.float(), q.float()[:, :63].T)


@pytest.mark.parametrize("T", [2, 8, 16])
def test_a_row_that_is_not_finite_stays_alone(T: int) -> None:
    case = draw(T, 7168, 64, torch.bfloat16, device="cuda")
    multiply = resolved(NORM_LINEAR_FP8, "cuda", 7168, 64)
    clean = multiply(case.x_TD, case.norm_D, 1e-5, case.q_OD, case.scale_OB)
    case.x_TD[1, 5000] = torch.nan
    y = multiply(case.x_TD, case.norm_D, 1e-5, case.q_OD, case.scale_OB)
    others = torch.arange(T, device="cuda") != 1
    assert torch.equal(y[others], clean[others])
    assert y[1].isnan().all()


@pytest.mark.parametrize(
    ("D", "O", "rest", "norm_dtype"),
    [(7168, 2112, 0, torch.bfloat16), (2048, 12288, 64, torch.float32), (8192, 7168, 0, torch.bfloat16)],
)
def test_one_token_has_the_bits_it_has_among_others(D: int, O: int, rest: int, norm_dtype: torch.dtype) -> None:
    case = draw(3, D, O, torch.bfloat16, rest=rest, device="cuda", norm_dtype=norm_dtype)
    weight = (case.q_OD, case.scale_OB, *([case.rest_RD] if rest else []))
    norm_linear = resolved(NORM_LINEAR_FP8, "cuda", D, O, rest)
    linear_add = resolved(LINEAR_ADD_FP8, "cuda", D, O)
    normed = norm_linear(case.x_TD, case.norm_D, 1e-5, *weight)
    added = linear_add(case.x_TD, *weight[:2], case.residual_TO)
    for t in range(3):
        one = slice(t, t + 1)
        assert torch.equal(norm_linear(case.x_TD[one], case.norm_D, 1e-5, *weight), normed[one])
        assert torch.equal(linear_add(case.x_TD[one], *weight[:2], case.residual_TO[one]), added[one])


@pytest.mark.parametrize("T", [1, 8, 16, 40])
def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote(T: int) -> None:
    D = 5120  # more than one pass
    cases = [draw(T, D, D, torch.bfloat16, device="cuda", seed=i) for i in range(6)]
    norm_linear, linear_add = (resolved(op, "cuda", D, D) for op in (NORM_LINEAR_FP8, LINEAR_ADD_FP8))

    def chain(wait: Callable[[], None]) -> torch.Tensor:
        x = cases[0].x_TD.clone()
        for case in cases:
            h = norm_linear(x, case.norm_D, 1e-5, case.q_OD, case.scale_OB)
            wait()
            x = linear_add(h, case.q_OD, case.scale_OB, x)
            wait()
        return x

    check_replays(chain)
