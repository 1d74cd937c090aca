"""Token ids from the device to the host, late: the copy starts at once, the wait comes when somebody asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Readback:
    """readback(ids) -> a call that gives the list of ints. On a CPU there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, ids_R: Tensor) -> Callable[[], list[int]]:
        if not self._cuda:
            values = ids_R.tolist()
            return lambda: values
        host = torch.empty(ids_R.shape, dtype=ids_R.dtype, pin_memory=True)
        host.copy_(ids_R, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> list[int]:
            done.synchronize()  # lets other threads run
            values: list[int] = host.tolist()
            return values

        return read
