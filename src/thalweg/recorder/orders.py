"""What every rank is told to do between two steps, and what it tells of a recording. No torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thalweg.core import SaveCache


class StartRecording(msgspec.Struct, frozen=True, array_like=True, tag="record"):
    """Record the steps from the next one on."""


class StopRecording(msgspec.Struct, frozen=True, array_like=True, tag="write"):
    """Stop, and write the rank's trace into `folder`."""

    folder: str


class FillCache(msgspec.Struct, frozen=True, array_like=True, tag="fill"):
    """Put random values into every block and state."""


class CountLaunches(msgspec.Struct, frozen=True, array_like=True, tag="count"):
    """Begin to count the kernels and copies of a CUDA device, or stop; rank 0 then tells how many there were, None
    without a device."""

    begin: bool


class MeasureLink(msgspec.Struct, frozen=True, array_like=True, tag="link"):
    """Time all-reduces of `size` bytes, or what data-parallel ranks exchange; rank 0 tells the bytes that it sent in a
    second."""

    size: int


class MeasureExchange(msgspec.Struct, frozen=True, array_like=True, tag="exchange"):
    """Time an implementation of an op that ranks run together, for so many rows; rank 0 tells microseconds per call.
    `sizes` are the op's dims but for the ranks."""

    op: str
    implementation: str
    sizes: dict[str, int]
    rows: int
    dtype: str


Order = StartRecording | StopRecording | FillCache | CountLaunches | MeasureLink | MeasureExchange | SaveCache


class Recorded(msgspec.Struct, frozen=True):
    """A rank's recording. began_ns and ended_ns are time.perf_counter_ns of the first step's launch and of the end;
    both are 0 if no step came."""

    began_ns: int
    ended_ns: int


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank's trace lies once all of it is written."""
    return folder / f"rank-{rank}.json"
