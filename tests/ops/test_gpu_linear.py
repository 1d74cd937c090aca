"""Ops "linear", "norm_linear" and "linear_add" on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops.moe_case import rmse_ratio
from tests.ops.replays import check_replays
from thalweg.ops.linear import LINEAR, LINEAR_ADD, NORM_LINEAR, LinearDims, NormLinearDims
from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu


def op(name: str, implementation: str, D: int, dtype: str = "bfloat16") -> Callable[..., torch.Tensor]:
    """It serves its range of tokens; other implementations serve the rest, as in a model."""
    resolver, where = Resolver({name: implementation}), Where("cuda", dtype)
    if name == "norm_linear":
        return resolver.resolve(NORM_LINEAR, where, NormLinearDims(D=D, parts=(1,)))
    if name == "linear_add":
        return resolver.resolve(LINEAR_ADD, where, LinearDims(D=D, O=1))
    return resolver.resolve(LINEAR, where, LinearDims(D=D, O=1))


def check(implementation: str, T: int, D: int, O: int, dtype: torch.dtype, tolerance: float, pad: int = 8) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    name = str(dtype).removeprefix("torch.")
    x, w, norm = draw(T, D + pad)[:, :D], draw(O, D), 1 + draw(D) / 8
    product = x.double() @ w.double().T
    normed = rms_norm(x.double(), norm.double(), 1e-5)
    torch.full((T, O), torch.nan, device="cuda", dtype=dtype)  # freed: the output is likely to be made of it
    assert rmse_ratio(op("norm_linear", implementation, D, name)(x, norm, 1e-5, w), normed @ w.double().T) < tolerance
    added = "in_place" if implementation == "triton" else implementation
    for residual in (draw(T, O), draw(T, O + 3)[:, :O]):
        expected = product + residual.double()
        assert rmse_ratio(op("linear_add", added, D, name)(x, w, residual), expected) < tolerance
    if implementation == "cuda":
        assert rmse_ratio(op("linear", "cuda", D, name)(x, w), product) < tolerance


@pytest.mark.parametrize("T", [1, 2, 3, 8, 9, 15, 16, 17, 24, 32, 33])
@pytest.mark.parametrize(
    ("D", "O"),
    [(2304, 12576), (2304, 6720), (4096, 2304), (1024, 2304), (96, 37), (32, 4001), (7168, 2112), (18432, 1024)],
)
def test_projections(T: int, D: int, O: int) -> None:
    check("cuda", T, D, O, torch.bfloat16, 0.005)


@pytest.mark.parametrize("T", [1, 16])
def test_a_norm_with_its_weight_in_fp32(T: int) -> None:
    x, w = torch.randn(T, 4096, device="cuda").bfloat16(), torch.randn(1000, 4096, device="cuda").bfloat16()
    norm = 1 + torch.randn(4096, device="cuda") / 8
    expected = rms_norm(x.double(), norm.double(), 1e-5) @ w.double().T
    assert rmse_ratio(op("norm_linear", "cuda", 4096)(x, norm, 1e-5, w), expected) < 0.005


@pytest.mark.parametrize("T", [1, 16])
def test_rows_that_are_not_aligned(T: int) -> None:
    check("cuda", T, 2304, 300, torch.bfloat16, 0.005, pad=1)


@pytest.mark.parametrize("T", [1, 8, 33])
@pytest.mark.parametrize(("D", "O"), [(9216, 2304), (300, 37)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
def test_other_shapes_by_the_library(T: int, D: int, O: int, dtype: torch.dtype, tolerance: float) -> None:
    check("triton", T, D, O, dtype, tolerance)


@pytest.mark.parametrize(("T", "D"), [(2, 7168), (8, 4096), (16, 4096), (32, 2304)])
def test_a_row_that_is_not_finite_stays_alone(T: int, D: int) -> None:
    linear_add, norm_linear = op("linear_add", "cuda", D), op("norm_linear", "cuda", D)
    x, w = torch.randn(T, D, device="cuda").bfloat16(), torch.randn(64, D, device="cuda").bfloat16()
    residual = torch.randn(T, 64, device="cuda").bfloat16()
    norm = torch.ones_like(x[0])
    clean = linear_add(x, w, residual.clone()), norm_linear(x, norm, 1e-5, w)
    x[1, 7] = torch.nan
    others = torch.arange(T, device="cuda") != 1
    for a, b in zip(clean, (linear_add(x, w, residual.clone()), norm_linear(x, norm, 1e-5, w)), strict=True):
        assert torch.equal(a[others], b[others])
        assert b[1].isnan().all()


@pytest.mark.parametrize("T", [1, 2, 8, 16, 32])
def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote(T: int) -> None:
    linear_add, norm_linear = op("linear_add", "cuda", 2048), op("norm_linear", "cuda", 2048)
    weights = torch.randn(20, 2, 2048, 2048, device="cuda").bfloat16() / 45
    norm = torch.ones(2048, device="cuda").bfloat16()
    first = torch.randn(T, 2048, device="cuda").bfloat16()

    def chain(wait: Callable[[], None]) -> torch.Tensor:
        x = first.clone()
        for w, v in weights:
            h = norm_linear(x, norm, 1e-5, w)
            wait()
            x = linear_add(h, v, x)
            wait()
        return x

    check_replays(chain)
