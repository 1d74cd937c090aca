"""Calls of the CPU's C++ ops, recorded once and made again as one call, as a CUDA graph launches its kernels.

Between two ops of a small model Python takes as long as the ops do. A recording has the addresses and numbers that ops
were called with, and keeps alive the tensors they belong to, so that calling them again is the same work on the same
memory. That holds for ops in C++ alone: what torch computes while recording would not be computed again.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from thalweg.ops.toolchain import cpu_build
from thalweg.ops.toolchain.cpu_build import BuildError

LINE = 64  # bytes, which results begin at a multiple of
_ASKS = frozenset({"__get__", "__len__", "data_ptr", "dim", "element_size", "is_contiguous", "numel", "size", "stride"})
_ALLOCATES = frozenset({"empty", "new_empty"})
_VIEWS = frozenset(  # copies, some of them, of what cannot be viewed so
    {"__getitem__", "chunk", "contiguous", "expand", "flatten", "reshape", "select", "split", "squeeze", "t"}
    | {"transpose", "unbind", "unflatten", "unsqueeze", "view"}
)


class Scratch:
    """Memory for what the calls of recordings give one another: `limit` bytes of addresses, of which those that are
    written take memory.

    As in a step that is not recorded, the memory of a result serves another one once nobody refers to the first.
    Recordings with the same scratch overwrite each other's results, so that together they take what the largest does.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._memory = torch.empty(limit, dtype=torch.uint8)
        self._most = 0
        self.begin()

    def begin(self) -> None:
        """From here on all of it is free again."""
        self._used = 0
        self._free: dict[int, list[Tensor]] = {}  # by size

    def like(self, made: Tensor) -> Tensor | None:
        """A tensor of the same size and dtype, uninitialised; None if that is more than the limit."""
        size = made.numel() * made.element_size()
        padded = max(LINE, -(-size // LINE) * LINE)
        free = self._free.setdefault(padded, [])
        place = free.pop() if free else self._next(padded)
        if place is None:
            return None
        memory = place.numpy()[:size]
        # A storage of its own, which goes with its last view.
        finalize(memory, free.append, place).atexit = False
        return torch.from_numpy(memory).view(made.dtype).view(made.shape)

    def _next(self, size: int) -> Tensor | None:
        begin, end = self._used, self._used + size
        if end > self.limit:
            return None
        self._used, self._most = end, max(self._most, end)
        return self._memory[begin:end]

    def __contains__(self, tensor: Tensor) -> bool:
        at = self._memory.data_ptr()
        return at <= tensor.data_ptr() < at + self.limit

    def __len__(self) -> int:
        """Bytes that are written."""
        return self._most


class Recording:
    """Calls in their order. `why_not` says why they cannot be replayed; None if they can."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        self._calls: list[tuple[str, Sequence[Any], tuple[Any, ...]]] = []
        self._kept: list[Any] = []  # what calls have addresses of
        self._replay: Callable[[], int] | None = None  # refers to nothing here: who lets go of this frees it at once

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self) -> None:
        """Make all calls again; other Python threads may run. Raises RuntimeError if one fails."""
        assert self._replay is not None
        done = self._replay()
        if done < len(self._calls):
            raise RuntimeError(f"{self._calls[done][0]} failed, call {done} of {len(self._calls)} of a recorded step")

    def add(self, name: str, types: Sequence[Any], args: tuple[Any, ...]) -> None:
        """A call that has just been made: the C++ function's name, the ctypes types of its arguments, and these."""
        self._calls.append((name, types, args))

    def _refuse(self, reason: str) -> None:
        self.why_not = self.why_not or reason

    def _end(self) -> None:
        """Lay the calls out as replay.cpp reads them."""
        if self.why_not is not None:
            self._calls.clear()
            self._kept.clear()
            return
        slots = [_packed(types, args) for _, types, args in self._calls]
        memory = ctypes.create_string_buffer(b"".join(slots))
        at, table = ctypes.addressof(memory), []
        for (name, *_), packed in zip(self._calls, slots, strict=True):
            table += [cpu_build.address(f"{name}_again"), at]
            at += len(packed)
        calls = (ctypes.c_void_p * len(table))(*table)
        self._kept += [memory, calls]
        run = cpu_build.function("replay", ctypes.c_void_p, ctypes.c_int64)
        self._replay = partial(run, calls, len(self._calls))


def _packed(types: Sequence[Any], args: tuple[Any, ...]) -> bytes:
    form = "".join("f4x" if kind is ctypes.c_float else "q" for kind in types)
    return struct.pack(f"<{form}", *map(_number, args))


def _number(arg: Any) -> int | float:
    if isinstance(arg, ctypes.Array):
        return ctypes.addressof(arg)
    return 0 if arg is None else arg


class _Watch(TorchFunctionMode):
    """Gives what torch makes a place, and notices what it computes. A TorchDispatchMode would see more than what Python
    asks for, and imports for two seconds."""

    def __init__(self, recording: Recording, scratch: Scratch) -> None:
        super().__init__()
        self._recording, self._scratch = recording, scratch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.__name__
        if name in _ASKS or self._recording.why_not is not None:
            return made
        if name in _ALLOCATES:
            place = self._scratch.like(made)
            if place is None:
                self._recording._refuse(f"its results take more than {self._scratch.limit >> 20} MiB")
                return made
            return place
        if not (name in _VIEWS and _is_view(made, args[0])):
            self._recording._refuse(f"torch runs {name} between ops in C++")
        elif args[0] not in self._scratch:
            self._recording._kept.append(made)
        return made


def _is_view(made: Any, of: Tensor) -> bool:
    """Whether all tensors `made` lie in the memory of one."""
    tensors = [made] if isinstance(made, Tensor) else made
    return all(t.untyped_storage().data_ptr() == of.untyped_storage().data_ptr() for t in tensors)


@contextmanager
def recording(scratch: Scratch) -> Iterator[Recording]:
    """Inside, this thread's calls of ops in C++ are made and recorded; replayed they work on the same memory, which
    for results is `scratch`."""
    recorded = Recording()
    recorded._kept.append(scratch)
    scratch.begin()
    with _Watch(recorded, scratch), cpu_build.telling(recorded.add):
        yield recorded
    try:
        recorded._end()
    except BuildError as e:
        recorded._refuse(str(e))
