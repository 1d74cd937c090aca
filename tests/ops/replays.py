"""Chains of kernels in a CUDA graph, each of which may start before the one ahead has ended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_replays(chain: Callable[[Callable[[], None]], Tensor], replays: int = 50) -> None:
    """That a captured chain gives the bits of one that waits for the device after each launch, by calling what it is
    given."""
    expected = chain(torch.cuda.synchronize).clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(lambda: None)
    for _ in range(replays):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
