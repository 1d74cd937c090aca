"""Op "norm_swiglu" on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.ops.moe_case import rmse_ratio
from tests.ops.replays import check_replays
from thalweg.ops.linear import LINEAR_ADD, LinearDims
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.swiglu import NORM_SWIGLU, NormSwigluDims

pytestmark = pytest.mark.gpu


def resolved(D: int, I: int, norm_fp32: bool = False) -> Callable[..., torch.Tensor]:
    return Resolver().resolve(NORM_SWIGLU, Where("cuda", "bfloat16"), NormSwigluDims(D=D, I=I, norm_fp32=norm_fp32))


@pytest.mark.parametrize("T", [0, 1, 3, 8, 9, 16, 17, 31, 32, 33, 64, 100, 128, 200])
@pytest.mark.parametrize("norm_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("D", "I"), [(4096, 12288), (2304, 9216), (5120, 1000), (256, 768), (4096, 1536), (2560, 8328)]
)
def test_norm_swiglu(T: int, D: int, I: int, norm_dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(T + D + I)
    x = torch.randn(T, D + 8, device="cuda", generator=g).bfloat16()[:, :D]
    w = (torch.randn(2 * I, D, device="cuda", generator=g) * D**-0.5).bfloat16()
    norm = (1 + torch.randn(D, device="cuda", generator=g) / 8).to(norm_dtype)
    torch.full((max(T, 1), I), torch.nan, device="cuda", dtype=torch.bfloat16)  # the output's memory, likely
    y = resolved(D, I, norm_dtype == torch.float32)(x, norm, 1e-5, w)
    assert y.shape == (T, I)
    assert y.is_contiguous()
    if T:
        gate, up = (F.rms_norm(x.double(), (D,), norm.double(), 1e-5) @ w.double().T).chunk(2, dim=-1)
        assert rmse_ratio(y, F.silu(gate) * up) < 0.008


@pytest.mark.parametrize("T", [1, 8, 24])
def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote(T: int) -> None:
    D, I = 4096, 12288
    swiglu = resolved(D, I)
    linear_add = Resolver().resolve(LINEAR_ADD, Where("cuda", "bfloat16"), LinearDims(D=I, O=D))
    ws = [(torch.randn(2 * I, D, device="cuda") * D**-0.5).bfloat16() for _ in range(3)]
    downs = [(torch.randn(D, I, device="cuda") * I**-0.5).bfloat16() for _ in range(3)]
    norm, first = torch.ones(D, device="cuda", dtype=torch.bfloat16), torch.randn(T, D, device="cuda").bfloat16()

    def chain(wait: Callable[[], None]) -> torch.Tensor:
        x = first.clone()
        for w, down in zip(ws, downs, strict=True):
            h = swiglu(x, norm, 1e-5, w)
            wait()
            x = linear_add(h, down, x)
            wait()
        return x

    check_replays(chain)
