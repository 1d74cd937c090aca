"""What a benchmark has every rank do between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from thalweg.runner.step import ModelRunner

REPEATS = 9


@torch.inference_mode()
def fill_cache(runner: ModelRunner) -> None:
    """Random values in every block and state: zeros would be quicker than what a run has."""
    for layer in runner.slots.cache.layers:
        for tensor in layer.values():
            if tensor.itemsize > 1:
                tensor.normal_(0, 0.1)
            else:  # torch draws none of one byte; every block or slot gets the same
                scale = 0.1 if tensor.is_floating_point() else 32
                tensor.copy_(torch.randn(tensor.shape[1:], device=tensor.device) * scale)


@torch.inference_mode()
def link_bytes_per_s(runner: ModelRunner, size: int) -> float:
    """Bytes per second that a rank sends in an all-reduce of `size` bytes, as a ring sends them, or in an exchange of
    as many, if ranks are data-parallel alone; the median of a few. To be called on all ranks at once, two or more."""
    mesh, device = runner.mesh, runner.slots.device
    n, x = mesh.tp_size, torch.zeros(size // 4, device=device)
    run: Callable[[Tensor], object] = mesh.all_reduce
    sent = 2 * (n - 1) / n * x.numel() * 4
    if n == 1:
        n, run = mesh.data.size, mesh.data.exchange
        x = x[: x.numel() // n * n].view(n, -1)
        sent = (n - 1) / n * x.numel() * 4
    samples = []
    for _ in range(2 + REPEATS):
        run(x[..., :1])  # so that all ranks begin together
        _wait(device)
        began = time.perf_counter()
        run(x)
        _wait(device)
        samples.append(time.perf_counter() - began)
    return sent / median(samples[2:])


class LaunchCount:
    """Kernels and copies of a CUDA device from now to `stop`, as torch's profiler counts them."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()

    def stop(self) -> int:
        torch.cuda.synchronize()
        self._profile.stop()
        events: Any = self._profile.events()
        return sum(1 for e in events if str(e.device_type).endswith("CUDA"))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
