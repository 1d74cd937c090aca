"""Spans sent on to the profiler, module names, and requests put into a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from tests.unit.trace_files import annotation, write
from thalweg import tracing
from thalweg.core import Prefill, StepPlan, StepResult
from thalweg.errors import ThalwegError
from thalweg.profiler.chrome import read_trace
from thalweg.profiler.requests import RequestTimes, write_with_requests
from thalweg.profiler.window import WindowedRunner, module_names


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("three rows")
        return self.linear(x)


def test_spans_are_forwarded_while_asked_for() -> None:
    seen = []

    @contextmanager
    def make(name: str) -> Iterator[None]:
        seen.append(f"+{name}")
        yield
        seen.append(f"-{name}")

    with tracing.span("before"):
        pass
    with tracing.forward(make):
        with tracing.span("outer"), tracing.span("inner"):
            pass
        with pytest.raises(RuntimeError, match="already"), tracing.record():
            pass
        late = tracing.span("late")
        late.__enter__()
    late.__exit__(None, None, None)  # open when the window closed
    with tracing.span("after"):
        pass
    assert seen == ["+outer", "+inner", "-inner", "-outer", "+late", "-late"]


def test_modules_are_named_by_class_and_index_and_only_inside(tmp_path: Path) -> None:
    model = nn.Sequential(Block(), Block())
    x = torch.zeros(2, 4)
    with profile() as recorded:
        model(x)
        with module_names(model):
            model(x)
            with pytest.raises(ValueError, match="three rows"):
                model(torch.zeros(3, 4))
            model[1](x)
        model(x)
    recorded.export_chrome_trace(str(tmp_path / "t.json"))
    slices = read_trace(str(tmp_path / "t.json"))
    modules = [s for s in slices if s.name.startswith("nn.Module: ")]
    whole = ["Sequential_0", "Block_0", "Linear_0", "Block_1", "Linear_1"]
    failed = ["Sequential_0", "Block_0"]  # closed by the exception, so that what follows is not inside them
    assert [s.name.removeprefix("nn.Module: ") for s in modules] == [*whole, *failed, "Block_1", "Linear_1"]
    assert [s.depth - modules[0].depth for s in modules] == [0, 1, 2, 1, 2, 0, 1, 0, 1]
    linears = [s for s in slices if s.name == "aten::linear"]
    inside = [s.parent_id >= 0 and slices[s.parent_id].name.startswith("nn.Module: Linear") for s in linears]
    assert inside == [False] * 2 + [True] * 3 + [False] * 2


class FakeRunner:
    """Runs a block a launch; a plan of three rows fails."""

    waits = False

    def __init__(self) -> None:
        self.model = Block()

    def launch(self, plan: StepPlan) -> Any:
        with tracing.span("model"):
            self.model(torch.zeros(len(plan.decode_slots), 4))
        return lambda: StepResult(plan.step, [])

    def close(self) -> None:
        pass


def plan(step: int, rows: int, prefill: int = 0) -> StepPlan:
    prefills = [Prefill(9, 0, prefill, True)] if prefill else []
    return StepPlan(step, [], [], list(range(1, rows + 1)), [5] * rows, prefills)


def test_a_window_is_its_launches_and_no_others(tmp_path: Path) -> None:
    runner = WindowedRunner(cast(Any, FakeRunner()), num_steps=2)
    runner.launch(plan(0, 1))
    runner.arm(after=1)
    # A launch with a prompt in it does not count; the first one without is waited for.
    launched = [runner.launch(plan(*p))().step for p in ((1, 2, 8), (2, 2), (3, 4), (4, 5, 8), (5, 6))]
    assert launched == [1, 2, 3, 4, 5]
    assert runner.closed
    assert runner.rows == [(4, 0), (5, 8)]
    assert 0 < runner.began_ns < runner.ended_ns
    runner.export(tmp_path / "t.json")
    names = [s.name for s in read_trace(str(tmp_path / "t.json")) if s.category == "user_annotation"]
    assert names == ["step", "model", "nn.Module: Block_0", "nn.Module: Linear_0"] * 2
    with tracing.record():  # nobody forwards spans any more
        pass


def test_a_window_that_fails_is_closed_with_its_runner() -> None:
    runner = WindowedRunner(cast(Any, FakeRunner()), num_steps=9)
    runner.arm(after=0)
    runner.launch(plan(0, 1))
    with pytest.raises(ValueError, match="three rows"):
        runner.launch(plan(1, 3))
    runner.close()
    assert runner.closed
    assert runner.rows == [(1, 0)]
    with tracing.record(), profile():
        pass


def test_requests_become_tracks_of_their_own(tmp_path: Path) -> None:
    recorded = Path(write(tmp_path / "in.json", [annotation("step", 100, 5), annotation("step", 110, 5)]))
    times = [
        RequestTimes("early", 7, added_ns=500, first_token_ns=900),  # decodes before the window opens at 1000
        RequestTimes("both", 7, added_ns=2_000, first_token_ns=4_500),
        RequestTimes("waiting", 7, added_ns=3_000),
    ]
    write_with_requests(recorded, tmp_path / "out.json", times, began_ns=1_000, ended_ns=11_000)
    found = [s for s in read_trace(str(tmp_path / "out.json")) if s.category == "request"]
    spans = {(s.track.partition(": ")[2], s.name): (s.ts, s.end, s.depth) for s in found}
    assert spans == {
        ("early", "request early"): (100_000, 110_000, 0),
        ("early", "decode"): (100_000, 110_000, 1),
        ("both", "request both"): (101_000, 110_000, 0),
        ("both", "prompt"): (101_000, 103_500, 1),
        ("both", "decode"): (103_500, 110_000, 1),
        ("waiting", "request waiting"): (102_000, 110_000, 0),
        ("waiting", "prompt"): (102_000, 110_000, 1),
    }
    whole = json.loads((tmp_path / "out.json").read_text())
    assert whole["displayTimeUnit"] == "ms"  # what else the profiler wrote is kept
    assert json.loads(found[0].args) == {"request": "early", "prompt_tokens": 7}


def test_a_trace_without_steps_is_refused(tmp_path: Path) -> None:
    recorded = Path(write(tmp_path / "in.json", []))
    with pytest.raises(ThalwegError, match="without the window's steps"):
        write_with_requests(recorded, tmp_path / "out.json", [], 0, 1)
    assert not (tmp_path / "out.json").exists()
