"""Device memory that the ranks of one host map from one another, for kernels that meet inside it (CUDA IPC).

Handles of the driver, by ctypes: memory that torch's allocator never sees, and 64 bytes per rank, which any channel
between processes carries. Nothing here is multicast.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import struct
import threading
from collections.abc import Callable, Sequence
from ctypes import CDLL, Structure, byref, c_char, c_char_p, c_size_t, c_ubyte, c_uint, c_uint64
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.errors import ThalwegError
from thalweg.parallel.data_ranks import DataRanks
from thalweg.parallel.mesh import Mesh

_log = logging.getLogger(__name__)
LAZY_PEER_ACCESS = 1  # of the driver's flags
KINDS = 2  # of places, which exchanges take in turn (ops/toolchain/ranks.cuh)


class Area(NamedTuple):
    """Where blocks of kernels of one kind meet: `table` int64 [ranks + 2] on the device has the addresses of all ranks'
    parts, of this rank's counts, and of the word that stops. Each of `blocks` has a place of `place_bytes` for each
    rank that writes and kind of places."""

    table: Tensor
    blocks: int
    place_bytes: int


class PeerMemory:
    """Zeroed memory on each rank's current device, and all ranks' mapped here, in areas of (blocks, place_bytes)."""

    def __init__(
        self, rank: int, gather: Callable[[bytes], Sequence[bytes]], ranks: int, areas: Sequence[tuple[int, int]]
    ) -> None:
        """`gather` gives every rank's bytes, in order; all ranks call this together. Raises NoPeerMemory."""
        sizes = [KINDS * ranks * blocks * place_bytes for blocks, place_bytes in areas]
        self.stopped = False
        self._watch: Watch | None = None
        self._opened: list[int] = []
        self._own, own, failure = (0, 0), 0, ""
        try:
            own = _allocate(sum(sizes))
            self._own = (sum(sizes), own)
            handle = struct.pack("<36sq64s", _host(), os.getpid(), _export(own))
        except (NoPeerMemory, OSError) as e:
            failure, handle = str(e), b""
        addresses, processes, handles = [], [], gather(handle.ljust(112, b"\0"))
        try:
            for r, theirs in enumerate(handles):
                if not theirs.rstrip(b"\0"):
                    raise NoPeerMemory(failure or f"rank {r} has none")
                host, process, exported = struct.unpack_from("<36sq64s", theirs)
                if host != _host():
                    raise NoPeerMemory("ranks are on several hosts")
                processes.append(process)
                if r != rank:
                    os.close(os.pidfd_open(process))  # or it could not be watched, as in some sandboxes
                    self._opened.append(_open(exported))
                addresses.append(own if r == rank else self._opened[-1])
        except (NoPeerMemory, OSError) as e:
            failure = failure or str(e)
        outcomes = [
            part.rstrip(b"\0").decode(errors="replace") for part in gather(failure.encode()[:120].ljust(120, b"\0"))
        ]
        if failure := next(filter(None, outcomes), ""):
            self.close()
            raise NoPeerMemory(failure)
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._counts = torch.zeros(sum(blocks for blocks, _ in areas), dtype=torch.int32, device="cuda")
        self.areas: list[Area] = []
        start, counts = 0, self._counts.data_ptr()
        for (blocks, place_bytes), size in zip(areas, sizes, strict=True):
            table = [*(address + start for address in addresses), counts, self._stop.data_ptr()]
            self.areas.append(Area(torch.tensor(table, dtype=torch.int64, device="cuda"), blocks, place_bytes))
            start, counts = start + size, counts + 4 * blocks
        torch.cuda.synchronize()
        self._watch = Watch([p for r, p in enumerate(processes) if r != rank], self._say_stop)

    def _say_stop(self) -> None:
        """End kernels that wait for another rank, now and from now on; what they give is undefined."""
        self.stopped = True  # ahead of what ends them: whoever has such a result can tell
        self._stop[0] = 1

    def close(self) -> None:
        """Once no kernel that uses it will run here. Its own part is kept for the next engine of this process: freeing
        what another process may still have mapped is undefined."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        for address in self._opened:
            with contextlib.suppress(NoPeerMemory):  # of a device that has failed
                _call("cuIpcCloseMemHandle", c_uint64(address))
        self._opened = []
        if self._own[1]:
            _spare.append((torch.cuda.current_device(), *self._own))
            self._own = (0, 0)


_spare: list[tuple[int, int, int]] = []  # (device, bytes, address) of memory that engines of this process had


class Watch:
    """Calls `on_end` a while after one of these processes of this host has ended, or never if closed before. In that
    while whoever watches the engine's processes ends it: no step whose sums went wrong is then taken for one."""

    def __init__(self, processes: Sequence[int], on_end: Callable[[], object], after_s: float = 1.0) -> None:
        """Raises OSError for a process that is not there."""
        self._on_end, self._after_s = on_end, after_s
        self._closing = os.eventfd(0)
        self._files = [self._closing]
        try:
            self._files.extend(map(os.pidfd_open, processes))
        except OSError:
            self._close_files()
            raise
        self._thread = threading.Thread(target=self._wait, name="thalweg-peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._closing, 1)
        self._thread.join()
        self._close_files()

    def _wait(self) -> None:
        ended, closing = select.poll(), select.poll()
        closing.register(self._closing, select.POLLIN)
        for file in self._files:
            ended.register(file, select.POLLIN)
        ended.poll()
        if not closing.poll(1e3 * self._after_s):
            self._on_end()

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)


class NoPeerMemory(ThalwegError):
    """Ranks cannot map each other's memory; says why."""


def map_peers(mesh: Mesh, device: torch.device, areas: Sequence[tuple[int, int]]) -> None:
    """Give `mesh` its `peers`, if there are other ranks and their devices let them. All ranks call this together."""
    if mesh.tp_size == 1 or mesh.hosts > 1 or device.type != "cuda":
        return
    mesh.peers = _mapped(
        mesh.tp_rank, mesh.tp_size, lambda own: mesh.gather_bytes(own, device), areas, "sums over ranks"
    )


def map_data_peers(ranks: DataRanks, device: torch.device, areas: Sequence[tuple[int, int]]) -> None:
    """The same of data-parallel ranks."""
    if ranks.size == 1 or ranks.hosts > 1 or device.type != "cuda":
        return
    ranks.peers = _mapped(ranks.rank, ranks.size, ranks.gather_bytes, areas, "decode steps' rows")


def _mapped(
    rank: int, ranks: int, gather: Callable[[bytes], Sequence[bytes]], areas: Sequence[tuple[int, int]], what: str
) -> PeerMemory | None:
    try:
        return PeerMemory(rank, gather, ranks, areas)
    except NoPeerMemory as e:
        if rank == 0:
            _log.warning("%s go by NCCL alone: ranks cannot map each other's memory: %s", what, e)
        return None


class _Handle(Structure):
    _fields_ = [("bytes", c_char * 64)]


def _host() -> bytes:
    """36 bytes that differ between hosts."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()[:36].ljust(36)


def _allocate(size: int) -> int:
    device, address = torch.cuda.current_device(), c_uint64()
    if found := next((spare for spare in _spare if spare[:2] == (device, size)), None):
        _spare.remove(found)
        address = c_uint64(found[2])
    else:
        _call("cuMemAlloc_v2", byref(address), c_size_t(size))
    _call("cuMemsetD8_v2", address, c_ubyte(0), c_size_t(size))
    torch.cuda.synchronize()
    return address.value


def _export(address: int) -> bytes:
    handle = _Handle()
    _call("cuIpcGetMemHandle", byref(handle), c_uint64(address))
    return bytes(handle)


def _open(handle: bytes) -> int:
    address = c_uint64()
    _call("cuIpcOpenMemHandle_v2", byref(address), _Handle.from_buffer_copy(handle), c_uint(LAZY_PEER_ACCESS))
    return address.value


def _call(name: str, *args: Any) -> None:
    if code := getattr(_driver(), name)(*args):
        words = c_char_p()
        _driver().cuGetErrorName(code, byref(words))
        raise NoPeerMemory(f"{name} says {(words.value or b'?').decode()} ({code})")


@cache
def _driver() -> Any:
    return CDLL("libcuda.so.1")
