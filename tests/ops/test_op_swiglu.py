"""Op "norm_swiglu" on a CPU: the reference against float64, and what serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.moe_case import rmse_ratio
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.swiglu import NORM_SWIGLU, NormSwigluDims


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("implementation", ["reference", "separate"])
@pytest.mark.parametrize("T", [0, 1, 20])
def test_norm_swiglu(T: int, implementation: str, dtype: torch.dtype, bound: float) -> None:
    g = torch.Generator().manual_seed(T)
    x, w = torch.randn(T, 40, generator=g).to(dtype), (torch.randn(48, 40, generator=g) / 6).to(dtype)
    norm = 1 + torch.randn(40, generator=g).to(dtype) / 8
    where = Where("cpu", str(dtype).removeprefix("torch."))
    op = Resolver({"norm_swiglu": implementation}).resolve(NORM_SWIGLU, where, NormSwigluDims(D=40, I=24))
    y = op(x, norm, 1e-5, w)
    assert (y.shape, y.dtype) == ((T, 24), dtype)
    if T:
        gate, up = (F.rms_norm(x.double(), (40,), norm.double(), 1e-5) @ w.double().T).chunk(2, dim=-1)
        assert rmse_ratio(y, F.silu(gate) * up) < bound
