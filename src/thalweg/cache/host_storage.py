"""What one rank keeps in host memory of blocks and snapshots: a row of bytes for each, and copies beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from thalweg.cache.storage import CacheStorage
from thalweg.core import HostCopies, StepPlan
from thalweg.errors import ConfigError
from thalweg.ops.host_tables import to_device

STAGING_BYTES = 64 << 20  # on the device, of each kind: rows are gathered there for a copy over the bus
Pairs = list[tuple[int, int]]


class HostStorage:
    """`blocks` has a row for each place, of all layers' parts of a block, and `snapshots` likewise of all states; row 0
    of each is nobody's.

    On a CUDA device the rows are pinned and copies run on a stream of their own, in the order of the plans, behind the
    steps before. The host waits for none of them. On the device a step waits for what it touches of what is being
    fetched, and, if it saves, until what was saved last has left the buffer for that; both ways share the stream, so
    what was fetched before that is then there too. Elsewhere everything is copied at once.
    """

    def __init__(self, cache: CacheStorage, num_blocks: int, num_snapshots: int) -> None:
        self._cache, self._device = cache, cache.device
        self._cuda = self._device.type == "cuda"
        self.blocks = Rows([t.unsqueeze(0) for t in cache.paged], num_blocks, self._device)
        self.snapshots = Rows(cache.saved, num_snapshots, self._device)
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        self._fetched: torch.cuda.Event | None = None  # when all that was asked for is there; None: it is
        self._targets: tuple[set[int], set[int]] = set(), set()  # blocks and snapshots not known to be there

    def fetching(self) -> bool:
        """Whether anything that was asked for is still under way."""
        event = self._fetched
        return event is not None and not event.query()

    def copy(self, plan: StepPlan) -> None:
        """Do a plan's copies, after those that its rows and copies have to wait for."""
        copies = plan.host
        if self._fetched is not None:
            self._wait(plan, copies)
        if copies is None:
            return
        row_of = self._cache.saved_row
        saved = [(row_of(snapshot), place) for snapshot, place in copies.snapshot_saves]
        fetched = [(place, row_of(snapshot)) for place, snapshot in copies.snapshot_fetches]
        self.blocks.save(copies.block_saves, self._stream)
        self.snapshots.save(saved, self._stream)
        self.blocks.fetch(copies.block_fetches, self._stream)
        self.snapshots.fetch(fetched, self._stream)
        if self._stream is not None and (fetched or copies.block_fetches):
            self._targets[0].update(block for _, block in copies.block_fetches)
            self._targets[1].update(snapshot for _, snapshot in copies.snapshot_fetches)
            self._fetched = torch.cuda.Event()
            self._fetched.record(self._stream)
            self._wait(plan, None)

    def settle(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        self.settle()
        self.blocks.close()
        self.snapshots.close()

    def _wait(self, plan: StepPlan, copies: HostCopies | None) -> None:
        """Have the device wait before the plan if it touches what is being fetched."""
        assert self._fetched is not None
        blocks = {block for _, _, block in plan.new_blocks}
        snapshots = {snapshot for *_, snapshot in (*plan.boundaries, *plan.snapshots, *plan.restores)}
        if copies is not None:
            blocks.update(block for block, _ in copies.block_saves)
            snapshots.update(snapshot for snapshot, _ in copies.snapshot_saves)
        if blocks & self._targets[0] or snapshots & self._targets[1]:
            torch.cuda.current_stream(self._device).wait_event(self._fetched)
        elif not self._fetched.query():
            return
        for targets in self._targets:
            targets.clear()


class Rows:
    """`rows` of host memory, each of which holds a row of every tensor in `parts` [owners, rows, ...] of the device."""

    def __init__(self, parts: list[Tensor], count: int, device: torch.device) -> None:
        self._device = device
        whole = all(prod(part.shape[2:]) * part.itemsize % 8 == 0 for part in parts)
        self.dtype = torch.int64 if whole else torch.uint8  # what is copied; the wider, the faster
        self._parts = [part.flatten(2).view(self.dtype) for part in parts]
        width = sum(part.shape[0] * part.shape[2] for part in self._parts)
        self.rows = torch.empty(count + 1 if width else 0, width, dtype=self.dtype)
        self._pinned = device.type == "cuda" and self.rows.numel() > 0
        if self._pinned:
            _pin(self.rows)
            most = max(1, min(count, STAGING_BYTES // (width * self.rows.itemsize)))
            # One for each way; the copies themselves go one after the other, on one stream.
            self._out, self._in = (torch.empty(most, width, dtype=self.dtype, device=device) for _ in range(2))
            self._out_free: torch.cuda.Event | None = None

    def save(self, pairs: Pairs, stream: torch.cuda.Stream | None) -> None:
        """Copy rows of the device into places, as (row, place)."""
        if not pairs:
            return
        if stream is None:
            self._gather([row for row, _ in pairs], into := self._empty(len(pairs)))
            self.rows[[place for _, place in pairs]] = into
            return
        main = torch.cuda.current_stream(self._device)
        for some in _parts(pairs, len(self._out)):
            if self._out_free is not None:
                main.wait_event(self._out_free)
            self._gather([row for row, _ in some], self._out[: len(some)])
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                for i, place, n in _runs([place for _, place in some]):
                    self.rows[place : place + n].copy_(self._out[i : i + n], non_blocking=True)
            self._out_free = torch.cuda.Event()
            self._out_free.record(stream)

    def fetch(self, pairs: Pairs, stream: torch.cuda.Stream | None) -> None:
        """Copy places into rows of the device, as (place, row)."""
        if not pairs:
            return
        if stream is None:
            self._scatter(self.rows[[place for place, _ in pairs]], [row for _, row in pairs])
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))  # for steps that still read the rows
        with torch.cuda.stream(stream):
            for some in _parts(pairs, len(self._in)):
                for i, place, n in _runs([place for place, _ in some]):
                    self._in[i : i + n].copy_(self.rows[place : place + n], non_blocking=True)
                self._scatter(self._in[: len(some)], [row for _, row in some])

    @property
    def row_bytes(self) -> int:
        return self.rows.shape[1] * self.rows.itemsize

    def take(self, sources: list[int]) -> Tensor:
        """[n, width] on the host: places, and rows of the device as minus their number."""
        taken = self.rows[[max(source, 0) for source in sources]]
        there = [i for i, source in enumerate(sources) if source < 0]
        if there:
            self._gather([-sources[i] for i in there], into := self._empty(len(there)))
            taken[there] = into.cpu()
        return taken

    def close(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.rows.data_ptr())
            self._pinned = False

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, self.rows.shape[1], dtype=self.dtype, device=self._device)

    def _gather(self, rows: list[int], into: Tensor) -> None:
        index = to_device(rows, self._device)
        for part, columns in self._columns(into):
            columns.copy_(part.index_select(1, index))

    def _scatter(self, source: Tensor, rows: list[int]) -> None:
        index = to_device(rows, self._device)
        for part, columns in self._columns(source):
            part.index_copy_(1, index, columns)

    def _columns(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part with the columns of `rows` that belong to it, [owners, rows, ...] too."""
        start = 0
        for part in self._parts:
            owners, _, width = part.shape
            end = start + owners * width
            yield part, rows[:, start:end].unflatten(1, (owners, width)).transpose(0, 1)
            start = end


def _parts(pairs: Pairs, most: int) -> Iterator[Pairs]:
    for start in range(0, len(pairs), most):
        yield pairs[start : start + most]


def _runs(places: list[int]) -> Iterator[tuple[int, int, int]]:
    """(index, place, n) of runs of n places that follow each other, since each copy over the bus has its price."""
    start = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1:
            yield start, places[start], i - start
            start = i


def _pin(tensor: Tensor) -> None:
    """Page-lock a tensor's memory, to the byte; torch's own allocator takes the next power of two."""
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(error) != 0:
        raise ConfigError(
            f"{tensor.nbytes >> 20} MiB of host memory cannot be pinned (CUDA error {int(error)}); lower"
            " --cpu-cache-memory or raise the limit of locked memory (ulimit -l)"
        )
