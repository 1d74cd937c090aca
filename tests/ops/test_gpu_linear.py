"""Ops "linear", "norm_linear" and "linear_add" on the device."""

from __future__ import annotations

import pytest
import torch

from tests.ops.moe_case import rmse_ratio
from thalweg.ops.norm.reference import rms_norm

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("T", [1, 2, 3, 8, 16, 33])
@pytest.mark.parametrize(("D", "O"), [(2304, 6720), (4096, 2304), (9216, 2304), (300, 37)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
def test_projections(T: int, D: int, O: int, dtype: torch.dtype, tolerance: float) -> None:
    from thalweg.ops.linear.triton import linear, linear_add, norm_linear

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    x, w, norm, residual = draw(T, D + 8)[:, :D], draw(O, D), 1 + draw(D) / 8, draw(T, O)
    torch.full((T, O), torch.nan, device="cuda", dtype=dtype)  # freed: the output is likely to be made of it
    product = x.double() @ w.double().T
    assert rmse_ratio(linear(x, w), product) < tolerance
    assert rmse_ratio(linear_add(x, w, residual.clone()), product + residual.double()) < tolerance
    normed = rms_norm(x.double(), norm.double(), 1e-5)
    assert rmse_ratio(norm_linear(x, norm, 1e-5, w), normed @ w.double().T) < tolerance


@pytest.mark.parametrize("T", [2, 8])
def test_a_row_that_is_not_finite_stays_alone(T: int) -> None:
    from thalweg.ops.linear.triton import linear_add, norm_linear

    x, w = torch.randn(T, 4096, device="cuda").bfloat16(), torch.randn(64, 4096, device="cuda").bfloat16()
    residual = torch.randn(T, 64, device="cuda").bfloat16()
    norm = torch.ones_like(x[0])
    clean = linear_add(x, w, residual.clone()), norm_linear(x, norm, 1e-5, w)
    x[1, 7] = torch.nan
    others = torch.arange(T, device="cuda") != 1
    for a, b in zip(clean, (linear_add(x, w, residual.clone()), norm_linear(x, norm, 1e-5, w)), strict=True):
        assert torch.equal(a[others], b[others])
        assert b[1].isnan().all()


@pytest.mark.parametrize("T", [1, 2, 8])
def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote(T: int) -> None:
    from thalweg.ops.linear.triton import linear_add, norm_linear

    weights = torch.randn(20, 2, 2048, 2048, device="cuda").bfloat16() / 45
    norm = torch.ones(2048, device="cuda").bfloat16()
    first = torch.randn(T, 2048, device="cuda").bfloat16()

    def chain(wait: bool) -> torch.Tensor:
        x = first.clone()
        for w, v in weights:
            h = norm_linear(x, norm, 1e-5, w)
            if wait:
                torch.cuda.synchronize()
            x = linear_add(h, v, x)
            if wait:
                torch.cuda.synchronize()
        return x

    expected = chain(wait=True).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(50):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
