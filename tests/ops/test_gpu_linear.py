"""Op "linear" on the device."""

from __future__ import annotations

import pytest
import torch

from tests.ops.moe_case import rmse_ratio

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("T", [1, 3, 4, 5, 16, 17, 64, 65])
@pytest.mark.parametrize(("D", "O"), [(2304, 6720), (4096, 2304), (9216, 2304), (300, 37)])
def test_linear(T: int, D: int, O: int) -> None:
    from thalweg.ops.linear.triton import linear

    x = torch.randn(T, D + 8, device="cuda").bfloat16()[:, :D]
    w = torch.randn(O, D, device="cuda").bfloat16()
    assert rmse_ratio(linear(x, w), x.double() @ w.double().T) < 0.005
    x, w = x.float(), torch.randn(O, D, device="cuda")
    assert rmse_ratio(linear(x, w), x.double() @ w.double().T) < 1e-5


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
@pytest.mark.parametrize("T", [1, 8, 33, 64])
def test_tiles(T: int, splits: int) -> None:
    from thalweg.ops.arrivals import arrivals
    from thalweg.ops.linear.triton import run_tiles

    x, w = torch.randn(T, 2304, device="cuda").bfloat16(), torch.randn(1001, 2304, device="cuda").bfloat16()
    y = torch.full((T, 1001), torch.nan, device="cuda", dtype=torch.bfloat16)
    for early in (False, True):
        run_tiles(x, w, y.fill_(torch.nan), splits=splits, early=early)
        assert rmse_ratio(y, x.double() @ w.double().T) < 0.005
    assert not arrivals(y.device).any()


@pytest.mark.parametrize("T", [1, 4, 8, 64])
def test_every_entry_is_written(T: int) -> None:
    from thalweg.ops.linear.triton import run_gemv, run_tiles

    x, w = torch.randn(T, 512, device="cuda").bfloat16(), torch.randn(1001, 512, device="cuda").bfloat16()
    y = torch.full((T, 1001), torch.nan, device="cuda", dtype=torch.bfloat16)
    (run_gemv if T <= 4 else run_tiles)(x, w, y)
    assert rmse_ratio(y, x.double() @ w.double().T) < 0.005


def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote() -> None:
    from thalweg.ops.linear.triton import linear

    weights = torch.randn(40, 2048, 2048, device="cuda").bfloat16() / 45
    for T in (1, 8, 40):
        x = torch.randn(T, 2048, device="cuda").bfloat16()

        def chain(x: torch.Tensor = x, *, wait: bool = False) -> torch.Tensor:
            for w in weights:
                x = linear(x, w)
                if wait:
                    torch.cuda.synchronize()
            return x

        expected = chain(wait=True).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain()
        for _ in range(50):
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, expected)
