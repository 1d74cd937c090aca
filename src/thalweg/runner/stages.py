"""Where the host writes the inputs of steps with prompts, for one copy to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STAGES = 4  # in turn: more than the steps that an engine has under way, so that it waits for none


class Stages:
    """On a CUDA device pinned host memory that is kept, since to pin so much anew takes the driver milliseconds in
    which nothing runs. On a CPU, where steps read it in place, each is memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._memory = torch.empty(STAGES, 0, dtype=torch.int64)
        self._turn = 0
        self._copied: list[Any] = [None] * STAGES  # an event behind what was launched with each stage

    def next(self, size: int) -> Tensor:
        """int64 [size] on the host, for a copy that is launched on the current stream before this is called again.
        Waits for the copy from the stage whose turn it is, if STAGES steps are launched ahead of the device."""
        if not self._cuda:
            return torch.empty(size, dtype=torch.int64)
        self._copied[self._turn] = torch.cuda.current_stream().record_event()
        self._turn = (self._turn + 1) % STAGES
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        if size > self._memory.shape[1]:  # what copies still read is not freed before they are over
            most = 1 << (size - 1).bit_length()
            self._memory = torch.empty(STAGES, most, dtype=torch.int64, pin_memory=True)
        return self._memory[self._turn, :size]
