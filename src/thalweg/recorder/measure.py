"""What a benchmark has every rank do between two steps."""

from __future__ import annotations

import time
from statistics import median

import torch

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
    """Bytes per second that a rank sends in an all-reduce of `size` bytes, as a ring sends them; the median of a few.
    To be called on all ranks at once, two or more."""
    mesh, device = runner.mesh, runner.slots.device
    x = torch.zeros(size // 4, device=device)
    samples = []
    for _ in range(2 + REPEATS):
        mesh.all_reduce(x[:1])  # so that all ranks begin together
        _wait(device)
        began = time.perf_counter()
        mesh.all_reduce(x)
        _wait(device)
        samples.append(time.perf_counter() - began)
    return 2 * (mesh.tp_size - 1) / mesh.tp_size * x.numel() * 4 / median(samples[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
