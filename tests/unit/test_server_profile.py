"""/start_profile and /stop_profile in front of a double, and the profiler of the engine process by itself."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from tests.unit.server_double import ClientDouble, run
from tests.unit.trace_files import annotation, write
from thalweg.cli import main
from thalweg.core import Request, RequestUpdate, SamplingParams, StepPlan
from thalweg.engine.processes import messages as m
from thalweg.engine.processes import profiler as profiler_module
from thalweg.engine.processes.profiler import Profiler
from thalweg.engine.recording import Recording
from thalweg.errors import ProfileConflict
from thalweg.profiler.chrome import read_trace
from thalweg.recorder.orders import Recorded, StopRecording, rank_file

TRACE = m.Trace("/traces/a.json.gz", 17, 3, 2, "steps")


class ProfiledDouble(ClientDouble):
    def __init__(self) -> None:
        super().__init__()
        self.profiler = m.ProfilerOptions("/traces", 10, 1 << 20)
        self.asked: list[Any] = []
        self.conflict = False

    async def start_profile(self, num_steps: int | None) -> None:
        self.asked.append(num_steps)
        if self.conflict:
            raise ProfileConflict("a profile is under way already")

    async def stop_profile(self) -> m.Trace:
        return TRACE


def test_profiles_are_started_and_stopped() -> None:
    async def work(http: httpx.AsyncClient, client: Any) -> None:
        for body, asked in ((b"", None), (b"{}", None), (b'{"num_steps": 5, "output_dir": null}', 5)):
            assert (await http.post("/start_profile", content=body)).status_code == 200
            assert client.asked[-1] == asked
        answer = await http.post("/stop_profile")
        assert answer.json() == {
            "file": "/traces/a.json.gz",
            "bytes": 17,
            "steps": 3,
            "ranks": 2,
            "full_of": "steps",
        }
        client.conflict = True
        answer = await http.post("/start_profile")
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "profile_conflict"

    run(work, ProfiledDouble())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"output_dir": "/etc"}', "output_dir is not supported here"),
        (b'{"num_steps": "5"}', 'num_steps is "5"'),
        (b'{"num_steps": true}', "num_steps is true"),
        (b"[]", "not a JSON object"),
        (b"{", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
    ],
)
def test_bad_bodies_start_nothing(body: bytes, words: str) -> None:
    async def work(http: httpx.AsyncClient, client: Any) -> None:
        answer = await http.post("/start_profile", content=body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert client.asked == []

    run(work, ProfiledDouble())


def test_without_the_option_there_is_no_profiler() -> None:
    async def work(http: httpx.AsyncClient, client: Any) -> None:
        for path in ("/start_profile", "/stop_profile"):
            answer = await http.post(path)
            assert answer.status_code == 404
            assert "--enable-profiler DIR" in answer.json()["error"]["message"]

    run(work)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--enable-profiler", "no/such/folder"], "--enable-profiler"),
        (["serve", "--enable-profiler", "pyproject.toml"], "--enable-profiler"),
        (["serve", "--profiler-max-bytes", "0"], "--profiler-max-bytes"),
        (["serve", "--profiler-max-steps", "0"], "--profiler-max-steps"),
        (["bench", "serve", "--profile-steps", "3"], "--profile"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


class FakeExecutor:
    """Rank 0 writes a trace of one step when it is told to stop, after a step came."""

    def __init__(self) -> None:
        self.steps, self.written = 0, True

    def submit(self, plan: StepPlan) -> Future[Any]:
        self.steps += 1
        return Future()

    def order(self, order: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(None)
        if isinstance(order, StopRecording):
            future = Future()
            if self.steps and self.written and order.folder:
                write(rank_file(Path(order.folder), 0), [annotation("step", 100, 50)])
            now = time.perf_counter_ns()
            future.set_result(Recorded(now - 60 * 10**9, now) if self.steps else Recorded(0, 0))
        return future


PLAN = StepPlan(0, [], [], [1], [5], [])


class Bench:
    """A profiler over a fake executor, and what it says."""

    def __init__(self, folder: Path, ranks: int = 1, max_steps: int = 10) -> None:
        self.executor, self.said = FakeExecutor(), []
        self.recording = Recording(cast(Any, self.executor), ranks)
        options = m.ProfilerOptions(str(folder), max_steps, 1 << 40)
        self.profiler = Profiler(self.recording, options, self.said.append)

    def start(self, num_steps: int | None = None) -> m.Profiled:
        self.profiler.take(m.StartProfile(1, num_steps))
        return self.said[-1]

    def stop(self) -> m.Profiled:
        before = len(self.said)
        self.profiler.take(m.StopProfile(2))
        return self.wait(before)

    def wait(self, before: int) -> m.Profiled:
        deadline = time.monotonic() + 20
        while len(self.said) == before and time.monotonic() < deadline:
            self.profiler.poll()
            time.sleep(0.005)
        return self.said[before]


def test_a_profile_becomes_one_file_with_the_requests_that_ran(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for name in ("before", "during"):
        bench.profiler.added(Request(id=name, prompt_token_ids=[1, 2], params=SamplingParams()))
    bench.profiler.updated([RequestUpdate("before", [3], "stop")])  # over before the window opened
    assert bench.start() == m.Profiled(1)
    assert bench.start().kind == "ProfileConflict"
    bench.profiler.updated([RequestUpdate("during", [3])])
    bench.recording.submit(PLAN)
    bench.profiler.ended("during")
    answer = bench.stop()
    assert (answer.id, answer.kind) == (2, None)
    assert answer.trace is not None
    assert (answer.trace.steps, answer.trace.ranks, answer.trace.full_of) == (1, 1, None)
    [file] = tmp_path.iterdir()
    assert (str(file), file.stat().st_size) == (answer.trace.file, answer.trace.bytes)
    slices = read_trace(str(file))
    assert {s.process for s in slices if s.name == "step"} == {"rank 0"}
    assert {s.track.partition(": ")[2] for s in slices if s.category == "request"} == {"during"}
    assert bench.stop().kind == "ProfileConflict"


def test_a_full_window_is_written_by_itself_and_kept_for_whoever_stops_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.start(2)
    for _ in range(5):
        bench.recording.submit(PLAN)
    deadline = time.monotonic() + 20
    while bench.profiler.writing and time.monotonic() < deadline:
        bench.profiler.poll()
        time.sleep(0.005)
    assert len(list(tmp_path.iterdir())) == 1
    answer = bench.stop()
    assert answer.trace is not None
    assert (answer.trace.steps, answer.trace.full_of) == (2, "steps")
    assert bench.stop().kind == "ProfileConflict"
    assert bench.start().kind is None  # and another one


def test_without_a_step_nothing_is_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.start()
    assert bench.stop().trace == m.Trace(None, 0, 0, 1, None)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_writes_nothing_is_named_and_the_next_profile_may_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler_module, "WRITE_SECONDS", 0.05)
    bench = Bench(tmp_path, ranks=2)
    bench.start()
    bench.recording.submit(PLAN)
    answer = bench.stop()
    assert (answer.kind, answer.reason) == ("ThalwegError", "the trace of rank 1 was not written within 0.05 s")
    assert not list(tmp_path.iterdir())
    assert bench.start().kind is None


def test_what_cannot_be_joined_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.start()
    bench.recording.submit(PLAN)
    bench.executor.written = False
    folder = next(tmp_path.iterdir())
    write(rank_file(folder, 0), [])
    answer = bench.stop()
    assert answer.kind == "ThalwegError"
    assert "without the window's steps" in answer.reason
    assert not list(tmp_path.iterdir())


def test_steps_and_traces_are_bounded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_steps=10)
    for steps in (0, -1, 11):
        assert bench.start(steps).kind == "InvalidRequest"
    for i in range(profiler_module.MAX_TRACES):
        (tmp_path / f"trace-{i}.json.gz").touch()
    assert bench.start().kind == "ProfileConflict"
    assert "remove some" in bench.said[-1].reason


def test_a_profiler_that_is_closed_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.start()
    bench.recording.submit(PLAN)
    bench.profiler.close()
    assert not list(tmp_path.iterdir())
