"""Counters in device memory by which programs of a launch await one another."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from thalweg.errors import KernelError


class _OfThread(threading.local):
    """What goes with its thread: an ended thread's number may be the next one's, and a step that failed between two
    launches leaves counters as they were."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, torch.device, int], Tensor] = {}


_of_thread = _OfThread()


def counters(kernel: str, device: torch.device, size: int) -> Tensor:
    """int32 [size] of this kernel and thread: zero between launches, which leave them so. Engines of one process have a
    thread for their rank each, and launches of two of them may run at the same time, those of one may not."""
    key = kernel, device, size
    if key not in _of_thread.made:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise KernelError(f"{kernel} ran for the first time while a graph was captured; run it once before")
        _of_thread.made[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return _of_thread.made[key]
