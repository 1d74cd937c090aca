"""Counters in device memory by which programs of a launch await one another."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

from thalweg.errors import KernelError


def counters(kernel: str, device: torch.device, size: int) -> Tensor:
    """int32 [size] of this kernel and thread: zero between launches, which leave them so. Engines of one process have a
    thread for their rank each, and launches of two of them may run at the same time, those of one may not."""
    return _of_thread(kernel, device, size, threading.get_ident())


@cache
def _of_thread(kernel: str, device: torch.device, size: int, thread: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError(f"{kernel} ran for the first time while a graph was captured; run it once before")
    return torch.zeros(size, dtype=torch.int32, device=device)
