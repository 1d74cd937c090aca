"""Captures of steps, with a stand-in for CUDA."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

from thalweg.runner import capture


class Double:
    """A graph and a stream that note what is asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def capture_begin(self, **_: Any) -> None:
        self.calls.append("begin")

    def capture_end(self) -> None:
        self.calls.append("end")

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.calls.append("replay")

    def wait_stream(self, _: Any) -> None:
        pass


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Double:
    double = Double()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: double)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: double)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(capture, "_stream", lambda _: double)
    return double


class Garbage:
    """An engine that was closed, say, whose graphs CUDA would be told to free."""

    def __init__(self, freed: list[str]) -> None:
        self.freed, self.itself = freed, self

    def __del__(self) -> None:
        self.freed.append("freed")


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_a_step_is_captured(graph: Double, enabled: bool) -> None:
    freed: list[str] = []

    def step() -> None:
        for _ in range(5000):  # far more new objects than the collector waits for
            Garbage(freed)
        assert not freed
        assert not gc.isenabled()

    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        replay, pool = capture.captured(step, None)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
    gc.collect()
    assert len(freed) == 5000
    assert pool == "pool"
    replay()
    assert graph.calls == ["begin", "end", "replay"]


def test_a_step_that_fails_ends_its_capture_and_the_pause_of_the_collector(graph: Double) -> None:
    def step() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture.captured(step, None)
    assert graph.calls == ["begin", "end"]
    assert gc.isenabled()


def test_a_step_that_fails_says_why_though_cuda_ended_its_capture(
    graph: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture_end() -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "capture_end", capture_end)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        capture.captured(step, None)
    with pytest.raises(RuntimeError, match="a previous error"):
        capture.captured(lambda: None, None)
    assert gc.isenabled()


def test_a_step_is_cut_into_graphs_behind_the_modules_named_and_replayed_in_order(graph: Double) -> None:
    layers = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3)))

    def step() -> None:
        for layer in layers:
            graph.calls.append("layer")
            layer(torch.zeros(1))
        graph.calls.append("head")

    replay, _ = capture.captured(step, None, cuts=[layers[0], layers[1]])
    cut = ["begin", "layer", "end"]
    assert graph.calls == [*cut, *cut, "begin", "layer", "head", "end"]
    graph.calls.clear()
    replay()
    assert graph.calls == ["replay"] * 3
    layers(torch.zeros(1))  # nothing of it is left
    assert graph.calls == ["replay"] * 3


def test_a_step_that_fails_behind_a_cut_ends_the_capture_under_way_alone(graph: Double) -> None:
    layer = torch.nn.Identity()

    def step() -> None:
        layer(torch.zeros(1))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture.captured(step, None, cuts=[layer])
    assert graph.calls == ["begin", "end"] * 2
