"""Chrome traces as torch's profiler writes them, made by hand: times in microseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOST, DEVICE = 4242, 0  # torch makes each device a process


def slice_(name: str, ts: float, dur: float, cat: str = "cpu_op", pid: int = HOST, tid: int = 1, **args: Any) -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "pid": pid, "tid": tid, "args": args}


def launch(ts: float, correlation: int) -> dict:
    return slice_("cudaLaunchKernel", ts, 1, "cuda_runtime", correlation=correlation)


def kernel(name: str, ts: float, dur: float, correlation: int, stream: int = 7) -> dict:
    return slice_(name, ts, dur, "kernel", DEVICE, stream, correlation=correlation, device=0)


def annotation(name: str, ts: float, dur: float) -> dict:
    return slice_(name, ts, dur, "user_annotation")


def write(path: Path, events: list[dict], **more: Any) -> str:
    path.write_text(json.dumps({"schemaVersion": 1, "displayTimeUnit": "ms", "traceEvents": events} | more))
    return str(path)
