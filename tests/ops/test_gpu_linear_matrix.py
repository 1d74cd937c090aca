"""Projections of up to 128 tokens by the matrix unit of warpgroups, on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops.moe_case import rmse_ratio
from tests.ops.replays import check_replays
from thalweg.ops.linear.matrix import Cut, some_tokens

pytestmark = pytest.mark.gpu
TOKENS = [1, 17, 33, 128]


def cuts(O: int) -> list[Cut | None]:
    """That which is chosen, and others."""
    split = [Cut(192, n, False) for n in (2, 4) if -(-O // 192) * n <= 128]
    return [None, Cut(64, 1, False), Cut(192, 1, True), Cut(104, 1, False), *split]


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("O", "D"), [(4096, 4096), (12352, 2048), (2048, 4096), (1000, 512), (24576, 1024), (40, 200)])
def test_products(T: int, O: int, D: int) -> None:
    x, w = torch.randn(T, D, device="cuda").bfloat16(), torch.randn(O, D, device="cuda").bfloat16()
    residual, wanted = torch.randn(T, O, device="cuda").bfloat16(), x.double() @ w.double().T
    for cut in cuts(O):
        assert rmse_ratio(some_tokens(x, w, how=cut), wanted) < 0.003, cut
        assert rmse_ratio(some_tokens(x, w, residual, how=cut), wanted + residual.double()) < 0.003, cut


def test_in_a_graph_under_load() -> None:
    """Weights are asked for while the kernel ahead runs, x is not: replays must equal a run with nothing in flight."""
    ws = [torch.randn(2048, 2048, device="cuda").bfloat16() / 45 for _ in range(12)]
    first = torch.randn(40, 2048, device="cuda").bfloat16()

    def chain(wait: Callable[[], None]) -> torch.Tensor:
        x = first
        for w in ws:
            x = some_tokens(x, w, x)
            wait()
        return x

    check_replays(chain)
