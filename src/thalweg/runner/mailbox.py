"""Pinned host memory between the host and captured steps: each step has a place in turn."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch

from thalweg.runner.slots import IntArray

PLACES = 8  # more than steps are under way


class Mailbox:
    """`rows` int64 [PLACES, R, N], which the host writes, and `ids` int64 [PLACES, N], which steps write, in host
    memory; `turn` int32 [1] on the device, of the step that begins next. Every step that begins there is `sent`."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.rows = torch.zeros(PLACES, rows, width, dtype=torch.int64, pin_memory=self._cuda)
        self.ids = torch.zeros(PLACES, width, dtype=torch.int64, pin_memory=self._cuda)
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._next = 0
        self._reads: list[Callable[[], list[int]] | None] = [None] * PLACES

    def begin(self) -> None:
        """The next step is the first again; those before are over."""
        self.turn.zero_()
        self._next, self._reads = 0, [None] * PLACES

    def place(self) -> IntArray:
        """The next step's rows [R, N], once the step that had the place before is over and its ids are kept."""
        if read := self._reads[self._next]:
            read()
        array: IntArray = self.rows[self._next].numpy()
        return array

    def sent(self, d: int) -> Callable[[], list[int]]:
        """To be called once the next step has been launched: what waits for its first d ids."""
        ids, done = self.ids[self._next], torch.cuda.Event() if self._cuda else None
        if done is not None:
            done.record()
        values: list[int] = []
        one_reader = Lock()  # whoever waits for the ids, or whoever wants the place again

        def read() -> list[int]:
            if done is not None:
                done.synchronize()  # lets other threads run
            with one_reader:
                if not values:
                    values.extend(ids[:d].tolist())
            return values

        self._reads[self._next] = read
        self._next = (self._next + 1) % PLACES
        return read
