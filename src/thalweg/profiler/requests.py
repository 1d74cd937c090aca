"""Requests as slices of a trace: one track each, the request over its prompt and decode phases."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from thalweg.errors import ThalwegError
from thalweg.profiler.summary import STEP

PROCESS = 1 << 30  # beyond any process id


@dataclass(slots=True)
class RequestTimes:
    """When a request was handed over and gave its first token, by time.perf_counter_ns; 0 for not yet."""

    id: str
    prompt_tokens: int
    added_ns: int
    first_token_ns: int = 0


class _Head(msgspec.Struct):
    name: str = ""
    cat: str = ""
    ts: float = 0.0


def write_with_requests(
    recorded: Path, output: Path, requests: Sequence[RequestTimes], began_ns: int, ended_ns: int
) -> None:
    """Copy the Chrome trace `recorded` to `output` (packed if that ends in .gz) with the requests added.

    began_ns is when the first step's span was entered, which ties the two clocks together; what of a request lies
    outside began_ns .. ended_ns is cut off. Raises OSError where `output` cannot be written.
    """
    trace = msgspec.json.decode(recorded.read_bytes(), type=dict[str, msgspec.Raw])
    events = msgspec.json.decode(trace["traceEvents"], type=list[msgspec.Raw])
    heads = msgspec.json.decode(trace["traceEvents"], type=list[_Head])
    first = min((h.ts for h in heads if h.name == STEP and h.cat == "user_annotation"), default=None)
    if first is None:
        raise ThalwegError("torch's profiler gave a trace without the window's steps; nothing was written")
    added = [e for i, r in enumerate(requests) for e in _events(i, r, first, began_ns, ended_ns)]
    added.append({"ph": "M", "name": "process_name", "pid": PROCESS, "tid": 0, "args": {"name": "requests"}})
    events += [msgspec.Raw(msgspec.json.encode(event)) for event in added]
    data = msgspec.json.encode({**trace, "traceEvents": events})
    output.write_bytes(gzip.compress(data, compresslevel=6) if output.suffix == ".gz" else data)


def _events(track: int, r: RequestTimes, first_us: float, began_ns: int, ended_ns: int) -> Iterator[dict[str, Any]]:
    middle = min(r.first_token_ns or ended_ns, ended_ns)
    parts = [(f"request {r.id}", r.added_ns, ended_ns), ("prompt", r.added_ns, middle), ("decode", middle, ended_ns)]
    place = {"pid": PROCESS, "tid": track}
    yield {"ph": "M", "name": "thread_name", **place, "args": {"name": r.id}}
    for name, begin, end in parts:
        begin = max(begin, began_ns)
        if end > begin:
            # Whole nanoseconds from the same zero, so that the phases lie within the request.
            begin_us, end_us = (round(first_us + (t - began_ns) / 1e3, 3) for t in (begin, end))
            args = {"request": r.id, "prompt_tokens": r.prompt_tokens}
            yield {
                "ph": "X", "cat": "request", "name": name, **place, "ts": begin_us, "dur": round(end_us - begin_us, 3),
                "args": args,
            }  # fmt: skip
