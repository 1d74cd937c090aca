"""A step turned into a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(step: Callable[[], None], pool: Any, warm_up: int = 0) -> tuple[Callable[[], None], Any]:
    """(what replays `step`, the memory pool of its graph). The step runs `warm_up` times first, which sets up what it
    needs of libraries. Graphs of one pool share memory, so they must not run at the same time, and none may rely on
    what an earlier run of it left there.

    Other threads may go on with what is theirs, as waiting for results, meanwhile.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay, pool or graph.pool()
