"""Op "linear" on the device."""

from __future__ import annotations

import pytest
import torch

from tests.ops.moe_case import rmse_ratio

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize(("D", "O"), [(2304, 6720), (4096, 2304), (9216, 2304), (300, 37)])
def test_linear(T: int, D: int, O: int) -> None:
    from thalweg.ops.linear.triton import linear

    x = torch.randn(T, D + 8, device="cuda").bfloat16()[:, :D]
    w = torch.randn(O, D, device="cuda").bfloat16()
    torch.full((T, O), torch.nan, device="cuda", dtype=torch.bfloat16)  # freed: the output is likely to be made of it
    assert rmse_ratio(linear(x, w), x.double() @ w.double().T) < 0.005
    x, w = x.float(), torch.randn(O, D, device="cuda")
    assert rmse_ratio(linear(x, w), x.double() @ w.double().T) < 1e-5


def test_chained_in_a_graph_reads_what_the_launch_ahead_wrote() -> None:
    from thalweg.ops.linear.triton import linear

    weights = torch.randn(40, 2048, 2048, device="cuda").bfloat16() / 45
    for T in (1, 2):
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
