"""Requests as slices of a trace: one track each, the request over its prompt and decode phases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

PROCESS = 1 << 30  # beyond any rank's


class RequestTimes(msgspec.Struct):
    """When a request was handed over, gave its first token and ended, by time.perf_counter_ns; 0 for not yet."""

    id: str
    prompt_tokens: int
    added_ns: int
    first_token_ns: int = 0
    ended_ns: int = 0


def request_events(
    requests: list[RequestTimes], first_us: float, began_ns: int, ended_ns: int
) -> Iterator[dict[str, Any]]:
    """Events of a Chrome trace, in a process of their own.

    first_us is when the first step began in the trace, and began_ns the same by the requests' clock; what of a request
    lies outside began_ns .. ended_ns is cut off.
    """
    yield {"ph": "M", "name": "process_name", "pid": PROCESS, "tid": 0, "args": {"name": "requests"}}
    for track, r in enumerate(requests):
        last = min(r.ended_ns or ended_ns, ended_ns)
        middle = min(r.first_token_ns or last, last)
        place = {"pid": PROCESS, "tid": track}
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": r.id}}
        for name, begin, end in (
            (f"request {r.id}", r.added_ns, last),
            ("prompt", r.added_ns, middle),
            ("decode", middle, last),
        ):
            begin = max(begin, began_ns)
            if end > begin:
                # Whole nanoseconds from the same zero, so that the phases lie within the request.
                begin_us, end_us = (round(first_us + (t - began_ns) / 1e3, 3) for t in (begin, end))
                args = {"request": r.id, "prompt_tokens": r.prompt_tokens}
                yield {
                    "ph": "X", "cat": "request", "name": name, **place, "ts": begin_us,
                    "dur": round(end_us - begin_us, 3), "args": args,
                }  # fmt: skip
