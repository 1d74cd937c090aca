"""A step turned into a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn


def captured(
    step: Callable[[], None], pool: Any, warm_up: int = 0, cuts: Sequence[nn.Module] = ()
) -> tuple[Callable[[], None], Any]:
    """(what replays `step`, the memory pool of its graphs). The step runs `warm_up` times first, which sets up what it
    needs of libraries. Graphs of one pool share memory, so they must not run at the same time, and none may rely on
    what an earlier run of it left there.

    The step is one graph, or several in a row: a new one begins after each call of a module of `cuts`. The device
    begins with a graph once all of it is launched, so that a small one ahead hides what launching the rest costs.

    Other threads may go on with what is theirs, as waiting for results, meanwhile. Memory that is cached for eager
    steps stays cached, or the next of them would wait until all of it is allocated anew.
    """
    graphs: list[torch.cuda.CUDAGraph] = []
    stream = _stream(torch.cuda.current_device())

    def begin() -> None:
        shared = graphs[0].pool() if graphs else pool
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool=shared, capture_error_mode="thread_local")

    def cut(*_: object) -> None:
        graphs[-1].capture_end()
        begin()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
        with _nothing_collected():
            begin()
            hooks = [module.register_forward_hook(cut) for module in cuts]
            try:
                step()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what ended the step may have made CUDA end the capture
                    graphs[-1].capture_end()
                raise
            finally:
                for hook in hooks:
                    hook.remove()
            graphs[-1].capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> None:
        for graph in graphs:
            graph.replay()

    return replay, pool or graphs[0].pool()


_lock = threading.Lock()


@contextlib.contextmanager
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
