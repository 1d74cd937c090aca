"""Spans sent on to the profiler, module names, windows of steps, and ranks and requests put into one trace."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
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
from thalweg.errors import ThalwegError
from thalweg.profiler.chrome import read_trace
from thalweg.profiler.sql import query
from thalweg.profiler.summary import by_rank, summarize
from thalweg.recorder import window as window_module
from thalweg.recorder.allocated import allocated
from thalweg.recorder.join import TASK_FILE, JoinTask, join
from thalweg.recorder.join import main as join_main
from thalweg.recorder.orders import (
    Recorded,
    StartRecording,
    StopRecording,
    full_file,
    missing,
    rank_file,
    read_recorded,
    recorded_file,
    rows_of_all,
)
from thalweg.recorder.requests import RequestTimes
from thalweg.recorder.window import RecordedRunner, module_names
from thalweg.runner.lock_step import Agreed


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

    def serve_others(self) -> None:
        pass

    def agree(self, agreed: Agreed) -> None:
        pass

    def close(self) -> None:
        pass


def plan(step: int, rows: int, prefill: int = 0) -> StepPlan:
    prefills = [Prefill(9, 0, prefill, True)] if prefill else []
    return StepPlan(step, [], [], list(range(1, rows + 1)), [5] * rows, prefills)


def test_a_recording_is_its_launches_and_no_others(tmp_path: Path) -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()), rank=3)
    runner.launch(plan(0, 1))
    for first in (1, 5):  # twice, since a server is profiled again and again
        assert runner.obey(StartRecording(str(tmp_path), 10)) is None
        launched = [runner.launch(plan(first + i, *rows))().step for i, rows in enumerate(((4,), (5, 8)))]
        assert launched == [first, first + 1]
        assert missing(tmp_path, 4) == [0, 1, 2, 3]
        runner.obey(StopRecording())
        recorded = read_recorded(tmp_path, 3)
        assert recorded.rows == [(4, 0), (5, 8)]
        assert 0 < recorded.began_ns < recorded.ended_ns
        runner.launch(plan(3, 6))
        runner.obey(StopRecording())  # it has ended
        files = {rank_file(tmp_path, 3), recorded_file(tmp_path, 3)}
        assert set(tmp_path.iterdir()) == files
        names = [s.name for s in read_trace(str(rank_file(tmp_path, 3))) if s.category == "user_annotation"]
        assert names == ["step", "model", "nn.Module: Block_0", "nn.Module: Linear_0"] * 2
        for file in files:
            file.unlink()
    with tracing.record():  # nobody forwards spans any more
        pass


def test_a_recording_ends_after_its_steps_those_for_other_ranks_included(tmp_path: Path) -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()))
    runner.serve_others()
    runner.obey(StartRecording(str(tmp_path), 3))
    with pytest.raises(ThalwegError, match="rank 0 is recording"):
        runner.obey(StartRecording(str(tmp_path), 3))
    runner.launch(plan(0, 2))
    runner.agree(Agreed(0, True, idle=False))  # of the plan that comes
    runner.launch(plan(1, 0, prefill=7))
    runner.agree(Agreed(0, True, idle=True))
    runner.serve_others()
    assert read_recorded(tmp_path, 0).rows == [(2, 0), (0, 7), (0, 0)]
    slices = read_trace(str(rank_file(tmp_path, 0)))
    assert [s.name for s in slices if s.category == "user_annotation"].count("step") == 3


def test_rows_of_data_parallel_ranks_are_added_up(tmp_path: Path) -> None:
    for rank, rows in enumerate(([(2, 0), (3, 0)], [(2, 0), (3, 0)], [(0, 9), (0, 0)], [(0, 9), (0, 0)])):
        recorded_file(tmp_path, rank).write_bytes(msgspec.json.encode(Recorded(rows)))
    assert rows_of_all(tmp_path, 4, share=2) == [(2, 9), (3, 0)]


def test_a_recording_without_steps_has_no_trace_and_one_without_a_folder_nothing(tmp_path: Path) -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()))
    runner.obey(StartRecording(str(tmp_path), 2))
    runner.obey(StopRecording())
    assert read_recorded(tmp_path, 0) == Recorded()
    assert list(tmp_path.iterdir()) == [recorded_file(tmp_path, 0)]
    runner.obey(StartRecording("", 2))
    runner.launch(plan(0, 1))
    runner.obey(StopRecording())


def test_what_keeps_a_trace_from_being_written_is_told_and_steps_go_on(tmp_path: Path) -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()))
    rank_file(tmp_path, 0).mkdir()
    runner.obey(StartRecording(str(tmp_path), 1))
    assert runner.launch(plan(0, 1))().step == 0
    with pytest.raises(ThalwegError, match="the trace of rank 0 was not written: "):
        read_recorded(tmp_path, 0)
    shutil.rmtree(tmp_path)
    runner.obey(StartRecording(str(tmp_path), 1))
    assert runner.launch(plan(1, 1))().step == 1


def test_a_recording_during_which_a_launch_fails_ends_with_its_runner(tmp_path: Path) -> None:
    runner = RecordedRunner(cast(Any, FakeRunner()))
    runner.obey(StartRecording(str(tmp_path), 5))
    runner.launch(plan(0, 1))
    with pytest.raises(ValueError, match="three rows"):
        runner.launch(plan(1, 3))
    runner.close()
    with tracing.record(), profile():
        pass


def test_a_rank_says_that_its_process_has_grown_by_the_bytes_of_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = iter([100, 100, 150, 151, 999])
    monkeypatch.setattr(window_module, "allocated", lambda: next(memory))
    runner = RecordedRunner(cast(Any, FakeRunner()))
    runner.obey(StartRecording(str(tmp_path), 1000, 50))
    for step in range(3):
        assert not full_file(tmp_path).exists()
        runner.launch(plan(step, 1))
    assert full_file(tmp_path).exists()
    runner.launch(plan(3, 1))  # until all are told to stop
    runner.obey(StopRecording())
    assert len(read_recorded(tmp_path, 0).rows) == 4


def test_what_the_process_holds_is_read_from_the_system() -> None:
    if not allocated():
        pytest.skip("the C library has no mallinfo2")
    before = allocated()
    held = bytearray(8 << 20)  # never touched, so that it is not resident
    assert allocated() - before >= len(held)


def test_requests_become_tracks_of_their_own(tmp_path: Path) -> None:
    write(rank_file(tmp_path, 0), [annotation("step", 100, 5), annotation("step", 110, 5)])
    times = [
        RequestTimes("early", 7, added_ns=500, first_token_ns=900),  # decodes before the window opens at 1000
        RequestTimes("both", 7, added_ns=2_000, first_token_ns=4_500, ended_ns=9_000),
        RequestTimes("waiting", 7, added_ns=3_000),
        RequestTimes("before", 7, added_ns=300, first_token_ns=400, ended_ns=800),
    ]
    join(tmp_path, tmp_path / "out.json", JoinTask(1, Recorded([(1, 0)], 1_000, 11_000), times))
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
    join(tmp_path, tmp_path / "out.json.gz", JoinTask(2, Recorded([(1, 0)], 1, 2), []))
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
        join(tmp_path, tmp_path / "out.json.gz", JoinTask(2, Recorded([(1, 0)], 1, 2), []))
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
    (tmp_path / TASK_FILE).write_bytes(msgspec.json.encode(JoinTask(1, Recorded([(1, 0)], 1, 2), [])))
    assert join_main(str(tmp_path), str(tmp_path / "out.json")) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
