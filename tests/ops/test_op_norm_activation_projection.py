"""The small ops against float64, and their rounding points bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thalweg.ops.activation.reference import silu_and_mul
from thalweg.ops.norm.reference import gated_rms_norm, rms_norm
from thalweg.ops.projection.reference import batched_projection

DTYPES = [torch.float32, torch.bfloat16]


def rms_fp64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def assert_rounded(out: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Within one rounding of the float64 value (and fp32 error)."""
    assert out.dtype == dtype
    rtol = 2**-8 + 1e-5 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(out.double(), truth, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(dtype: torch.dtype, weight_dtype: torch.dtype, eps: float) -> None:
    x, weight = torch.randn(5, 33).to(dtype) * 0.1, torch.randn(33).to(weight_dtype)
    x[3] = 0
    assert_rounded(rms_norm(x, weight, eps), rms_fp64(x, weight, eps), dtype)


def test_rms_norm_rounds_once_after_the_weight() -> None:
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    expected = rms_norm(x.float(), weight.float(), 1e-5).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_does_not_overflow_in_bf16() -> None:
    x = torch.full((1, 16), 1e18).bfloat16()
    torch.testing.assert_close(rms_norm(x, torch.ones(16), 1e-6), torch.ones(1, 16).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_rms_norm_norms_each_head(dtype: torch.dtype) -> None:
    o, gate, weight = (
        torch.randn(5, 3, 16).to(dtype),
        torch.randn(5, 3, 16).to(dtype),
        torch.randn(16).to(dtype),
    )
    truth = rms_fp64(o, weight, 1e-5) * gate.double().sigmoid()
    assert_rounded(gated_rms_norm(o, gate, weight, 1e-5), truth, dtype)
    assert_rounded(gated_rms_norm(o, gate, weight, 1e-5, silu=True), truth * gate.double(), dtype)


def test_gated_rms_norm_by_silu_of_gates_far_out_and_an_fp32_weight() -> None:
    o, weight = torch.randn(2, 3, 16).bfloat16(), torch.randn(16)
    gate = torch.full((2, 3, 16), 60.0).bfloat16()
    gate[1] = -200.0
    truth = rms_fp64(o, weight, 1e-6) * gate.double() * gate.double().sigmoid()
    assert_rounded(gated_rms_norm(o, gate, weight, 1e-6, silu=True), truth, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 24) * 4).to(dtype)
    gate, up = x[:, :12].double(), x[:, 12:].double()
    assert_rounded(silu_and_mul(x), gate * gate.sigmoid() * up, dtype)


def test_silu_and_mul_saturates_without_nan() -> None:
    out = silu_and_mul(torch.tensor([[-200.0, 200.0, 1.0, 1.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 200.0]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batched_projection_is_two_linears(dtype: torch.dtype) -> None:
    x, w = torch.randn(9, 2, 8).to(dtype), torch.randn(2, 20, 8).to(dtype)
    y = batched_projection(x, w)
    assert y.shape == (9, 2, 20)
    for i in range(2):
        assert y[:, i].stride(-1) == 1
        truth = x[:, i].double() @ w[i].double().t()
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y[:, i].double(), truth, rtol=tolerance, atol=tolerance)
