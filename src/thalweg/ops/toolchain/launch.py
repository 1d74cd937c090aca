"""Launches a kernel through the driver. What a launch is told of lies in memory that is made once for each kernel and
thread, so that a launch costs the host a few microseconds."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from ctypes import (
    CDLL,
    Structure,
    addressof,
    byref,
    c_char,
    c_double,
    c_float,
    c_int,
    c_longlong,
    c_uint,
    c_ulonglong,
    c_void_p,
)
from functools import cache
from struct import Struct
from typing import Any

from torch import Tensor

EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
FORMATS = {  # of 8 bytes each
    c_int: "i4x",
    c_uint: "I4x",
    c_longlong: "q",
    c_ulonglong: "Q",
    c_float: "f4x",
    c_double: "d",
    c_void_p: "Q",
    None: "8x",
}


class _Attribute(Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_int), ("rest", c_char * 60)]


class _Config(Structure):
    _fields_ = [
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("num_attributes", c_uint),
    ]


class _Frame(threading.local):
    """A launch's arguments, of a thread: `places` are where the driver finds each."""

    def __init__(self, threads: int, kinds: Sequence[Any]) -> None:
        self.attribute = _Attribute(id=EARLY, value=1)
        self.config = _Config(1, 1, 1, threads, 1, 1, 0, None, addressof(self.attribute), 1)
        self.config_at = byref(self.config)
        self.pack = Struct("<" + "".join(FORMATS[kind] for kind in kinds))
        self.memory = (c_char * max(1, self.pack.size))()
        first = addressof(self.memory)
        self.places = (c_void_p * max(1, len(kinds)))(*(first + 8 * i for i in range(len(kinds))))


class Launcher:
    """A function of the driver's with blocks of so many threads. Its arguments are of the same kinds each time."""

    def __init__(self, function: int, threads: int) -> None:
        self._function, self._threads = c_void_p(function), threads
        self._frame: _Frame | None = None

    def __call__(
        self, grid: tuple[int, int, int], shared_bytes: int, stream: int, args: Sequence[Tensor | tuple[Any, Any]]
    ) -> int:
        """The driver's status. The kernel starts before the one ahead of it has ended."""
        if (frame := self._frame) is None:
            kinds = [c_void_p if isinstance(a, Tensor) else a[0] for a in args]
            frame = self._frame = _Frame(self._threads, kinds)
        values = []
        for i, a in enumerate(args):
            if isinstance(a, Tensor):
                values.append(a.data_ptr())
            elif a[0] is None:
                frame.places[i] = addressof(a[1])
            else:
                values.append(a[1])
        frame.pack.pack_into(frame.memory, 0, *values)
        config = frame.config
        config.grid_x, config.grid_y, config.grid_z = grid
        config.shared_bytes, config.stream = shared_bytes, stream
        status: int = driver().cuLaunchKernelEx(frame.config_at, self._function, frame.places, None)
        return status


@cache
def driver() -> Any:
    """The library of CUDA's driver. Raises OSError where there is none."""
    return CDLL("libcuda.so.1")
