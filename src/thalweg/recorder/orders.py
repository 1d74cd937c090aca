"""What every rank is told to do between two steps, and what it leaves of a recording. No torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thalweg.core import SaveCache
from thalweg.errors import ThalwegError


class StartRecording(msgspec.Struct, frozen=True, array_like=True, tag="record"):
    """Record the next `steps` steps, and write the rank's trace and then its Recorded into `folder`. An engine's rank 0
    says that it is `full` once it has allocated `bytes` more than now (where the C library tells): an event of a trace
    takes about as much memory as it takes in the trace's file. Nothing is written without a folder."""

    folder: str
    steps: int
    bytes: int | None = None


class StopRecording(msgspec.Struct, frozen=True, array_like=True, tag="write"):
    """End the recording, if it has not ended by itself."""


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
    """A rank's recording: decode rows and prompt tokens of each step that it ran, both 0 if it ran others' experts
    alone. began_ns and ended_ns are time.perf_counter_ns of the first step's launch and of the end. Without steps there
    is no trace. `error` says why it could not be written."""

    rows: list[tuple[int, int]] = []
    began_ns: int = 0
    ended_ns: int = 0
    error: str | None = None


def rank_file(folder: Path, rank: int) -> Path:
    """A rank's trace. Ranks of all data-parallel ones are counted, those that share a model one after another."""
    return folder / f"rank-{rank}.json"


def recorded_file(folder: Path, rank: int) -> Path:
    """A rank's Recorded, which is there once all that the rank writes is."""
    return folder / f"rank-{rank}.recorded.json"


def full_file(folder: Path) -> Path:
    """Is there once a rank has allocated as much as it may."""
    return folder / "full"


def missing(folder: Path, ranks: int) -> list[int]:
    """Ranks that have not written all of theirs (yet)."""
    return [rank for rank in range(ranks) if not recorded_file(folder, rank).exists()]


def read_recorded(folder: Path, rank: int) -> Recorded:
    """Raises ThalwegError if the rank could not write its trace."""
    recorded = msgspec.json.decode(recorded_file(folder, rank).read_bytes(), type=Recorded)
    if recorded.error is not None:
        raise ThalwegError(f"the trace of rank {rank} was not written: {recorded.error}")
    return recorded


def rows_of_all(folder: Path, ranks: int, share: int) -> list[tuple[int, int]]:
    """Decode rows and prompt tokens of each step, over data-parallel ranks of `share` ranks each."""
    of_ranks = [read_recorded(folder, rank).rows for rank in range(0, ranks, share)]
    return [(sum(d for d, _ in step), sum(t for _, t in step)) for step in zip(*of_ranks, strict=True)]
