"""A step turned into a CUDA graph."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def captured(step: Callable[[], None], pool: Any, warm_up: int = 0) -> tuple[Callable[[], None], Any]:
    """(what replays `step`, the memory pool of its graph). The step runs `warm_up` times first, which sets up what it
    needs of libraries. Graphs of one pool share memory, so they must not run at the same time, and none may rely on
    what an earlier run of it left there.

    Other threads may go on with what is theirs, as waiting for results, meanwhile. Memory that is cached for eager
    steps stays cached, or the next of them would wait until all of it is allocated anew.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
        with _nothing_collected():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, pool or graph.pool()


_lock = threading.Lock()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage is collected meanwhile, and no other capture begins. Graphs of an engine that was closed may be
    garbage, and CUDA ends a capture if its thread frees another graph."""
    with _lock:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all captures on a device, as memory of a pool is shared within a stream."""
    return torch.cuda.Stream(device)
