"""Products with matrices in float8 against explicit dequantisation, whose last block of columns is ragged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thalweg.ops.linear.fp8.reference import linear_add_fp8, linear_fp8, norm_linear_fp8
from thalweg.ops.norm.reference import rms_norm


def dequantized(q_OD: Tensor, scale_OB: Tensor) -> Tensor:
    """float64, an element at a time."""
    w = torch.empty(q_OD.shape, dtype=torch.float64)
    for o in range(q_OD.shape[0]):
        for d in range(q_OD.shape[1]):
            w[o, d] = float(q_OD[o, d].float()) * float(scale_OB[o, d // 128])
    return w


@pytest.mark.parametrize(("D", "O"), [(128, 3), (64, 7), (129, 5), (300, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_fp8(D: int, O: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(D)
    q = (torch.randn(O, D, generator=g) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(O, -(-D // 128), generator=g) * 0.01 + 1e-4  # no powers of two
    w = dequantized(q, scales).to(dtype).double()
    for T in (0, 1, 9):
        x = torch.randn(T, D + 8, generator=g).to(dtype)[:, :D]
        y = linear_fp8(x, q, scales)
        assert y.dtype == dtype
        assert y.is_contiguous()
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(y.double(), x.double() @ w.t(), rtol=tolerance, atol=tolerance)


def test_each_row_and_block_of_columns_has_its_scale() -> None:
    q = torch.ones(2, 256).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    x = torch.zeros(2, 256)
    x[0, 127], x[1, 128] = 1, 1
    assert torch.equal(linear_fp8(x, q, scales), torch.tensor([[1.0, 100.0], [10.0, 1000.0]]))


def test_rest_norm_and_residual_are_those_of_plain_weights() -> None:
    g = torch.Generator().manual_seed(0)
    q = (torch.randn(6, 256, generator=g) * 50).to(torch.float8_e4m3fn)
    scales, rest = torch.rand(6, 2, generator=g), torch.randn(3, 256, generator=g)
    x, norm, residual = (torch.randn(*shape, generator=g) for shape in ((4, 256), (256,), (4, 6)))
    w = torch.cat([dequantized(q, scales).float(), rest])
    tolerance = {"rtol": 1e-5, "atol": 1e-2}
    torch.testing.assert_close(linear_fp8(x, q, scales, rest), x @ w.T, **tolerance)
    normed = rms_norm(x, norm, 1e-5)
    torch.testing.assert_close(norm_linear_fp8(x, norm, 1e-5, q, scales, rest), normed @ w.T, **tolerance)
    torch.testing.assert_close(linear_add_fp8(x, q, scales, residual), residual + x @ w[:6].T, **tolerance)
