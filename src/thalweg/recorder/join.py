"""The traces of all ranks and the times of requests as one Chrome trace, each rank a process of it.

`python -m thalweg.recorder.join FOLDER OUTPUT` does it in a process of its own, since it takes seconds.
"""

from __future__ import annotations

import gzip
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from thalweg.errors import ThalwegError
from thalweg.recorder.orders import Recorded, rank_file
from thalweg.recorder.requests import RequestTimes, request_events
from thalweg.tracing import STEP

TASK_FILE = "join.json"
_CORRELATION = re.compile(rb'("correlation":\s*)(\d+)')
_IDS_OF_A_RANK = 1 << 40  # more than one process counts up to in a window
_DROPPED = frozenset({"process_name", "process_labels", "process_sort_index"})  # of the processes that ranks replace


class JoinTask(msgspec.Struct):
    """What is to be joined. `recorded` is rank 0's."""

    ranks: int
    recorded: Recorded
    requests: list[RequestTimes]


class _Event(msgspec.Struct, omit_defaults=True, kw_only=True):
    """An event of torch's trace with all its fields, so that it can be written again."""

    ph: str
    name: str | msgspec.UnsetType = msgspec.UNSET
    cat: str | msgspec.UnsetType = msgspec.UNSET
    ts: float | msgspec.UnsetType = msgspec.UNSET
    dur: float | msgspec.UnsetType = msgspec.UNSET
    pid: int | str | msgspec.UnsetType = msgspec.UNSET
    tid: int | str | msgspec.UnsetType = msgspec.UNSET
    id: int | str | msgspec.UnsetType = msgspec.UNSET
    s: str | msgspec.UnsetType = msgspec.UNSET
    bp: str | msgspec.UnsetType = msgspec.UNSET
    args: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]
    baseTimeNanoseconds: int = 0
    deviceProperties: msgspec.Raw = msgspec.Raw(b"[]")


def join(folder: Path, output: Path, task: JoinTask) -> None:
    """Write `output`, packed if it ends in .gz, from the ranks' files in `folder`, one rank after another.

    Raises ThalwegError if a file is not what torch's profiler writes, OSError if `output` cannot be written; what was
    written of it is gone then.
    """
    trace = _read(folder, 0)
    base, first = trace.baseTimeNanoseconds, _first_step(trace.traceEvents)
    head = {"schemaVersion": 1, "deviceProperties": trace.deviceProperties, "displayTimeUnit": "ms"}
    try:
        with output.open("wb") as raw, _packed(raw) if output.suffix == ".gz" else nullcontext(raw) as file:
            file.write(msgspec.json.encode({**head, "baseTimeNanoseconds": base})[:-1] + b',"traceEvents":[')
            for rank in range(task.ranks):
                if rank:
                    trace = _read(folder, rank)
                later_us = (trace.baseTimeNanoseconds - base) / 1e3
                file.write(msgspec.json.encode(_of_rank(rank, trace.traceEvents, later_us))[1:-1] + b",")
            recorded = task.recorded
            events = list(request_events(task.requests, first, recorded.began_ns, recorded.ended_ns))
            file.write(msgspec.json.encode(events)[1:] + b"}")
    except BaseException:
        output.unlink(missing_ok=True)
        raise


def _packed(raw: BinaryIO) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=4)


def _read(folder: Path, rank: int) -> _Trace:
    try:
        return msgspec.json.decode(rank_file(folder, rank).read_bytes(), type=_Trace)
    except msgspec.MsgspecError as e:
        raise ThalwegError(f"torch's profiler gave a trace of rank {rank} that cannot be read: {e}") from None


def _first_step(events: list[_Event]) -> float:
    found = (e.ts for e in events if e.name == STEP and e.cat == "user_annotation" and isinstance(e.ts, float))
    first = min(found, default=None)
    if first is None:
        raise ThalwegError("torch's profiler gave a trace without the window's steps; nothing was written")
    return first


def _of_rank(rank: int, events: list[_Event], later_us: float) -> list[Any]:
    """The rank's events under one process; times and ids as those of rank 0's are, and unlike any other rank's."""
    pid = rank + 1  # 0 is the idle process to trace viewers
    kept: list[Any] = [
        {"ph": "M", "name": name, "pid": pid, "tid": 0, "args": args}
        for name, args in (("process_name", {"name": f"rank {rank}"}), ("process_sort_index", {"sort_index": rank}))
    ]
    for e in events:
        if e.ph == "M" and e.name in _DROPPED:
            continue
        e.pid = pid
        if isinstance(e.ts, float):
            e.ts = round(e.ts + later_us, 3)
        if rank:
            if isinstance(e.id, int):  # what an arrow's two ends have in common
                e.id += rank * _IDS_OF_A_RANK
            if isinstance(e.args, msgspec.Raw) and b'"correlation"' in bytes(e.args):
                e.args = msgspec.Raw(_CORRELATION.sub(lambda m: m[1] + _shift(m[2], rank), bytes(e.args)))
        kept.append(e)
    return kept


def _shift(number: bytes, rank: int) -> bytes:
    return b"%d" % (int(number) + rank * _IDS_OF_A_RANK)


def main(folder: str, output: str) -> int:
    """Exit code 0, or 2 with one line on standard error."""
    try:
        task = msgspec.json.decode((Path(folder) / TASK_FILE).read_bytes(), type=JoinTask)
        unfinished = Path(folder) / Path(output).name
        join(Path(folder), unfinished, task)
        unfinished.rename(output)
    except (ThalwegError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
