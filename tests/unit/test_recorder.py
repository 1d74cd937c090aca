"""Spans sent on to the profiler, module names, windows of steps, and ranks and requests put into one trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from tests.unit.trace_files import HOST, annotation, kernel, launch, write
from thalweg import tracing
from thalweg.core import Prefill, StepPlan, StepResult
from thalweg.engine import recording as recording_module
from thalweg.engine.recording import Limits, Recording
from thalweg.errors import ThalwegError
from thalweg.profiler.chrome import read_trace
from thalweg.profiler.sql import query
from thalweg.profiler.summary import by_rank, summarize
from thalweg.recorder.join import TASK_FILE, JoinTask, join
from thalweg.recorder.join import main as join_main
from thalweg.recorder.orders import Recorded, StartRecording, StopRecording, rank_file
from thalweg.recorder.requests import RequestTimes
from thalweg.recorder.window import RecordedRunner, module_names


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


def test_a_recording_is_its_launches_and_no_others(tmp_path: Path) -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()), rank=3)
    runner.launch(plan(0, 1))
    for first in (1, 5):  # twice, since a server is profiled again and again
        assert runner.obey(StartRecording()) is None
        launched = [runner.launch(plan(first + i, *rows))().step for i, rows in enumerate(((4,), (5, 8)))]
        assert launched == [first, first + 1]
        recorded = runner.obey(StopRecording(str(tmp_path)))
        assert 0 < recorded.began_ns < recorded.ended_ns
        runner.launch(plan(3, 6))
        [file] = tmp_path.iterdir()
        assert file == rank_file(tmp_path, 3)
        names = [s.name for s in read_trace(str(file)) if s.category == "user_annotation"]
        assert names == ["step", "model", "nn.Module: Block_0", "nn.Module: Linear_0"] * 2
        file.unlink()
    with tracing.record():  # nobody forwards spans any more
        pass


def test_orders_out_of_turn_are_refused_and_change_nothing(tmp_path: Path) -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()))
    stop = StopRecording(str(tmp_path))
    with pytest.raises(ThalwegError, match="rank 0 is not recording"):
        runner.obey(stop)
    runner.obey(StartRecording())
    with pytest.raises(ThalwegError, match="rank 0 is recording"):
        runner.obey(StartRecording())
    assert runner.obey(stop) == Recorded(0, 0)  # no step came
    assert not list(tmp_path.iterdir())


def test_a_recording_during_which_a_launch_fails_ends_with_its_runner() -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()))
    runner.obey(StartRecording())
    runner.launch(plan(0, 1))
    with pytest.raises(ValueError, match="three rows"):
        runner.launch(plan(1, 3))
    runner.close()
    with tracing.record(), profile():
        pass


class FakeExecutor:
    """Takes plans and orders in; the trace of rank 0 is written with the order to stop."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.taken.append(plan.step)
        return Future()

    def order(self, order: Any) -> Future[Any]:
        self.taken.append(type(order).__name__)
        future: Future[Any] = Future()
        if isinstance(order, StopRecording):
            rank_file(Path(order.folder), 0).touch()
            future.set_result(Recorded(5, 9))
        else:
            future.set_result(None)
        return future


def test_a_window_waits_for_decode_steps_and_closes_when_it_is_full(tmp_path: Path) -> None:
    executor = FakeExecutor()
    recording = Recording(cast(Any, executor), ranks=2)
    recording.submit(plan(0, 1))
    recording.start(tmp_path, Limits(2), after=1)
    # A step with a prompt in it does not count; the first one without is waited for.
    for step, rows in enumerate([(2, 8), (2,), (4,), (5, 8), (6,)], start=1):
        recording.submit(plan(step, *rows))
    assert executor.taken == [0, 1, 2, "StartRecording", 3, 4, "StopRecording", 5]
    assert recording.rows == [(4, 0), (5, 8)]
    assert (recording.closed, recording.full_of) == (True, "steps")
    assert recording.result() is None
    assert recording.missing() == [1]
    rank_file(tmp_path, 1).touch()
    assert recording.result() == Recorded(5, 9)


def test_a_window_closes_when_the_process_has_grown_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = iter([100, 100, 150, 151, 999])
    monkeypatch.setattr(recording_module, "_memory", lambda: next(memory))
    executor = FakeExecutor()
    recording = Recording(cast(Any, executor), ranks=1)
    recording.start(tmp_path, Limits(1000, 50))
    for step in range(4):
        recording.submit(plan(step, 1))
    assert executor.taken == ["StartRecording", 0, 1, 2, "StopRecording", 3]
    assert recording.full_of == "bytes"


def test_what_the_process_holds_is_read_from_the_system() -> None:
    if not recording_module._memory():
        pytest.skip("the C library has no mallinfo2")
    before = recording_module._memory()
    held = bytearray(8 << 20)  # never touched, so that it is not resident
    assert recording_module._memory() - before >= len(held)


def test_requests_become_tracks_of_their_own(tmp_path: Path) -> None:
    write(rank_file(tmp_path, 0), [annotation("step", 100, 5), annotation("step", 110, 5)])
    times = [
        RequestTimes("early", 7, added_ns=500, first_token_ns=900),  # decodes before the window opens at 1000
        RequestTimes("both", 7, added_ns=2_000, first_token_ns=4_500, ended_ns=9_000),
        RequestTimes("waiting", 7, added_ns=3_000),
        RequestTimes("before", 7, added_ns=300, first_token_ns=400, ended_ns=800),
    ]
    join(tmp_path, tmp_path / "out.json", JoinTask(1, Recorded(1_000, 11_000), times))
    found = [s for s in read_trace(str(tmp_path / "out.json")) if s.category == "request"]
    spans = {(s.track.partition(": ")[2], s.name): (s.ts, s.end, s.depth) for s in found}
    assert spans == {
        ("early", "request early"): (100_000, 110_000, 0),
        ("early", "decode"): (100_000, 110_000, 1),
        ("both", "request both"): (101_000, 108_000, 0),
        ("both", "prompt"): (101_000, 103_500, 1),
        ("both", "decode"): (103_500, 108_000, 1),
        ("waiting", "request waiting"): (102_000, 110_000, 0),
        ("waiting", "prompt"): (102_000, 110_000, 1),
    }
    assert json.loads(found[0].args) == {"request": "early", "prompt_tokens": 7}


def launch_and_kernel(at: float, correlation: int) -> list[dict[str, Any]]:
    arrow = {"ph": "s", "id": correlation, "cat": "ac2g", "name": "ac2g", "pid": HOST, "tid": 1, "ts": at}
    return [launch(at, correlation), kernel("k", at + 3, 4, correlation), arrow]


def test_ranks_become_processes_whose_times_and_correlations_do_not_mix(tmp_path: Path) -> None:
    for rank, base in ((0, 5_000), (1, 7_000)):
        events = [annotation("step", 100, 50), *launch_and_kernel(110, 3)]
        write(rank_file(tmp_path, rank), events, baseTimeNanoseconds=base)
    join(tmp_path, tmp_path / "out.json.gz", JoinTask(2, Recorded(1, 2), []))
    slices = read_trace(str(tmp_path / "out.json.gz"))
    assert {s.process for s in slices} == {"rank 0", "rank 1"}
    begins = {s.process: s.ts for s in slices if s.name == "step"}
    assert begins == {"rank 0": 100_000, "rank 1": 102_000}
    # Published SQL joins kernels with the calls that launched them; both ranks' correlation ids count from the same.
    sql = (
        "SELECT c.track, COUNT(*) FROM slice k"
        " JOIN slice c ON c.correlation = k.correlation AND c.category LIKE 'cuda_%'"
        " WHERE k.category = 'kernel' GROUP BY c.track ORDER BY c.track"
    )
    assert query(slices, sql).rows == [("rank 0: 1", 1), ("rank 1: 1", 1)]
    summaries = {name: summarize(mine) for name, mine in by_rank(slices).items()}
    assert [(s.steps, s.launches, s.launch_calls) for s in summaries.values()] == [(1, 1, 1)] * 2
    assert [d.device for s in summaries.values() for d in s.devices] == ["rank 0", "rank 1"]
    with gzip.open(tmp_path / "out.json.gz") as file:
        arrows = [e["id"] for e in json.load(file)["traceEvents"] if e["ph"] == "s"]
    assert len(set(arrows)) == 2


def test_a_rank_whose_file_is_damaged_leaves_no_half_of_a_trace(tmp_path: Path) -> None:
    write(rank_file(tmp_path, 0), [annotation("step", 100, 5)])
    rank_file(tmp_path, 1).write_bytes(b"{")
    with pytest.raises(ThalwegError, match="of rank 1 that cannot be read"):
        join(tmp_path, tmp_path / "out.json.gz", JoinTask(2, Recorded(1, 2), []))
    assert not (tmp_path / "out.json.gz").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"[]", "of rank 0 that cannot be read"), (b'{"traceEvents": []}', "without the window")],
)
def test_files_that_cannot_be_joined_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    if content is not None:
        rank_file(tmp_path, 0).write_bytes(content)
    (tmp_path / TASK_FILE).write_bytes(msgspec.json.encode(JoinTask(1, Recorded(1, 2), [])))
    assert join_main(str(tmp_path), str(tmp_path / "out.json")) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
