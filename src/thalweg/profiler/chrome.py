"""Reading a Chrome trace, as torch's profiler writes it: complete events into slices that nest, one list a file.

The file may come from anybody, so its size, its number of events and their depth are bounded.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any

import msgspec

from thalweg.errors import ConfigError

MAX_BYTES = 512 << 20  # once unpacked
MAX_SLICES = 2_000_000
MAX_DEPTH = 512
MAX_TIME_US = 2.0**52
_RANK = re.compile(r"rank \d{1,4}")
DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})  # categories of what a device does


class Slice(msgspec.Struct, gc=False):
    """A span of time on one track. Times in nanoseconds; `id` counts in order of `ts`, outer slices first.

    parent_id is -1 and depth 0 where nothing on the track encloses it. `correlation` is what a kernel has in common
    with the host's call that launched it, else -1. `args` is JSON text. `process` is "rank N" for a rank.
    """

    id: int
    parent_id: int
    ts: int
    dur: int
    name: str
    depth: int
    track: str
    category: str
    process: str
    correlation: int
    args: str

    @property
    def end(self) -> int:
        return self.ts + self.dur


class _Event(msgspec.Struct, gc=False):
    ph: str
    name: str = ""
    cat: str = ""
    ts: float = 0.0  # microseconds
    dur: float = 0.0
    pid: int | str = 0
    tid: int | str = 0
    args: msgspec.Raw = msgspec.Raw(b"")


class _Args(msgspec.Struct):
    name: Any = None
    correlation: Any = None


class _File(msgspec.Struct):
    traceEvents: list[_Event]


_decode_args = msgspec.json.Decoder(_Args | None).decode


def read_trace(path: str) -> list[Slice]:
    """The complete events ("ph": "X") of a Chrome trace, .json or .json.gz, ordered by id.

    Raises ConfigError, one line, where the file is missing, damaged, no trace, or passes the limits above.
    """
    data = _read(path)
    try:
        if data.lstrip()[:1] == b"[":
            events = msgspec.json.decode(data, type=list[_Event])
        else:
            events = msgspec.json.decode(data, type=_File).traceEvents
        names, processes = _track_names(events), _ranks(events)
        complete = [e for e in events if e.ph == "X"]
        if len(complete) > MAX_SLICES:
            raise ConfigError(f"{path} has {len(complete)} slices; expected at most {MAX_SLICES}: record fewer steps")
        return _nest(path, complete, names, processes)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise ConfigError(f"{path} is not a Chrome trace: {str(e).splitlines()[0][:160]}") from None


def _read(path: str) -> bytes:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{path}: no such file; expected a Chrome trace, .json or .json.gz")
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = gzip.GzipFile(fileobj=raw).read(MAX_BYTES + 1) if packed else raw.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ConfigError(f"{path} is a damaged gzip file: {e}") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} holds more than {MAX_BYTES >> 20} MiB; expected less: record fewer steps")
    return data


def _track_names(events: list[_Event]) -> dict[tuple[int | str, int | str], str]:
    found = {}
    for e in events:
        if e.ph == "M" and e.name == "thread_name" and (args := _decode_args(e.args or b"null")) and args.name:
            found[e.pid, e.tid] = str(args.name)
    return found


def _ranks(events: list[_Event]) -> dict[int | str, str]:
    """The processes that are ranks, as `thalweg profile` names them. Other names, such as "python", say nothing."""
    found = {}
    for e in events:
        if e.ph == "M" and e.name == "process_name" and (args := _decode_args(e.args or b"null")):
            name = str(args.name)
            if _RANK.fullmatch(name):
                found[e.pid] = name
    return found


def _nest(
    path: str,
    events: list[_Event],
    names: dict[tuple[int | str, int | str], str],
    processes: dict[int | str, str],
) -> list[Slice]:
    """Slices by time, each under the innermost slice of its track that encloses it whole."""
    for e in events:
        if not (abs(e.ts) <= MAX_TIME_US and 0 <= e.dur <= MAX_TIME_US):  # false for NaN as well
            raise ConfigError(f"{path}: slice {e.name[:80]!r} has ts {e.ts} and dur {e.dur}; expected microseconds")
    # Times are large numbers of microseconds with nanoseconds as decimals: exact only once the whole part is off.
    base = math.floor(min((e.ts for e in events), default=0.0))
    interned: dict[str, str] = {}
    rows = []
    for e in events:
        begin, end = round((e.ts - base) * 1000), round((e.ts - base) * 1000) + round(e.dur * 1000)
        rows.append((begin, -end, e))
    rows.sort(key=lambda row: row[:2])

    stacks: dict[tuple[int | str, int | str], list[Slice]] = {}
    slices: list[Slice] = []
    for begin, minus_end, e in rows:
        stack = stacks.setdefault((e.pid, e.tid), [])
        ts, end = begin + base * 1000, -minus_end + base * 1000
        while stack and (stack[-1].end <= ts or stack[-1].end < end):
            stack.pop()
        if len(stack) >= MAX_DEPTH:
            raise ConfigError(f"{path}: slices are nested more than {MAX_DEPTH} deep; expected fewer levels")
        args = _decode_args(e.args or b"null")
        correlation = args.correlation if args is not None and type(args.correlation) is int else -1
        found = Slice(
            id=len(slices),
            parent_id=stack[-1].id if stack else -1,
            ts=ts,
            dur=end - ts,
            name=interned.setdefault(e.name, e.name),
            depth=len(stack),
            track=f"{processes.get(e.pid, e.pid)}: {names.get((e.pid, e.tid), e.tid)}",
            category=interned.setdefault(e.cat, e.cat),
            process=processes.get(e.pid, str(e.pid)),
            correlation=correlation if 0 <= correlation < 1 << 62 else -1,
            args=bytes(e.args).decode(),
        )
        stack.append(found)
        slices.append(found)
    return slices
