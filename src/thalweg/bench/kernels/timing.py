"""Microseconds of a call, from many: in a CUDA graph, one after another on a device, or on the processor alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from thalweg.bench.spread import Spread

BUDGET_S, FEWEST, MOST = 0.1, 5, 50  # passes are repeated until the budget is spent, within the limits
CALLS_IN_A_GRAPH = 16  # at least, so that a replay is long against the clock and its own launch
HOST_CALLS = 500

Call = Callable[[], object]


def time_graph(calls: Sequence[Call], device: torch.device) -> Spread:
    """A CUDA graph of all calls in turn, replayed; they may launch themselves dependently on one another."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles what has to be compiled
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    calls = list(calls) * -(-CALLS_IN_A_GRAPH // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _microseconds(lambda: _device_seconds(graph.replay), len(calls))


def time_eager(calls: Sequence[Call], device: torch.device) -> Spread:
    """The calls in turn as they are launched from here, gaps on the device included."""

    def run() -> None:
        for call in calls:
            call()

    clock = _device_seconds if device.type == "cuda" else _wall_seconds
    return _microseconds(lambda: clock(run), len(calls))


def time_host(call: Call) -> Spread:
    """The processor's time of a call that launches nothing."""

    def run() -> None:
        for _ in range(HOST_CALLS):
            call()

    return _microseconds(lambda: _wall_seconds(run), HOST_CALLS)


def _microseconds(seconds_of_a_pass: Callable[[], float], calls: int) -> Spread:
    seconds_of_a_pass()
    count = int(BUDGET_S / max(seconds_of_a_pass(), 1e-9))
    samples = [seconds_of_a_pass() for _ in range(min(MOST, max(FEWEST, count)))]
    return Spread.of(1e6 * s / calls for s in samples)


def _wall_seconds(run: Call) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _device_seconds(run: Call) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3
