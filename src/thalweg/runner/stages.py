"""Where the host writes the inputs of steps with prompts, for one copy to the device."""

from __future__ import annotations

import torch
from torch import Tensor

STAGES = 4  # in turn: a copy to the device may still be reading one when the next step is staged


class Stages:
    """On a CUDA device pinned host memory that is kept, since to pin so much anew takes the driver milliseconds in
    which nothing runs. On a CPU, where steps read it in place, each is memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._memory = torch.empty(STAGES, 0, dtype=torch.int64)
        self._turn = 0

    def next(self, size: int) -> Tensor:
        """int64 [size] on the host, written anew once STAGES - 1 further ones were given."""
        if not self._cuda:
            return torch.empty(size, dtype=torch.int64)
        if size > self._memory.shape[1]:  # what copies still read is not freed before they are over
            most = 1 << (size - 1).bit_length()
            self._memory = torch.empty(STAGES, most, dtype=torch.int64, pin_memory=True)
        self._turn = (self._turn + 1) % STAGES
        return self._memory[self._turn, :size]
