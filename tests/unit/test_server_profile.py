"""/start_profile and /stop_profile in front of a double, and the profiler by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.unit.server_double import ClientDouble, run
from tests.unit.trace_files import annotation, write
from thalweg.cli import main
from thalweg.core import Request, RequestUpdate, SamplingParams
from thalweg.engine.processes import profiler as profiler_module
from thalweg.engine.processes.profiler import Profiler, ProfilerOptions, Trace
from thalweg.errors import EngineDeadError, InvalidRequest, ProfileConflict, ThalwegError
from thalweg.profiler.chrome import read_trace
from thalweg.recorder.orders import Order, Recorded, StartRecording, full_file, rank_file, recorded_file

TRACE = Trace("/traces/a.json.gz", 17, 3, 2, "steps")


class ProfiledDouble(ClientDouble):
    def __init__(self) -> None:
        super().__init__()
        self.profiler = ProfilerOptions("/traces", 10, 1 << 20)
        self.asked: list[Any] = []
        self.conflict = False

    async def start_profile(self, num_steps: int | None) -> None:
        self.asked.append(num_steps)
        if self.conflict:
            raise ProfileConflict("a profile is under way already")

    async def stop_profile(self) -> Trace:
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


class FakeRanks:
    """Ranks that write a trace of one step when they are told to stop, or have run as many as they should."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.writing = ranks, list(range(ranks))
        self.order: StartRecording | None = None
        self.rows: list[tuple[int, int]] = []

    async def obey(self, order: Order) -> None:
        if isinstance(order, StartRecording):
            if self.order is not None:
                raise ThalwegError("rank 0 is recording")
            self.order, self.rows = order, []
        elif self.order is not None:
            self._end(Path(self.order.folder))

    def step(self) -> None:
        if self.order is not None:
            self.rows.append((1, 0))
            if len(self.rows) == self.order.steps:
                self._end(Path(self.order.folder))

    def _end(self, folder: Path) -> None:
        self.order, now = None, time.perf_counter_ns()
        for rank in self.writing:
            if self.rows and not rank_file(folder, rank).exists():
                write(rank_file(folder, rank), [annotation("step", 100, 50)])
            recorded = Recorded(self.rows, now - 60 * 10**9, now)
            recorded_file(folder, rank).write_bytes(msgspec.json.encode(recorded))


class Bench:
    """A profiler over fake ranks."""

    def __init__(self, folder: Path, ranks: int = 1, share: int = 1, max_steps: int = 10) -> None:
        self.ranks = FakeRanks(ranks)
        options = ProfilerOptions(str(folder), max_steps, 1 << 40)
        self.profiler = Profiler(self.ranks.obey, options, ranks, share)
        self.start, self.stop = self.profiler.start, self.profiler.stop


def in_loop(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 30)

    asyncio.run(main())


def test_a_profile_becomes_one_file_with_the_requests_that_ran(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path, ranks=4, share=2)
        for name in ("before", "during"):
            bench.profiler.added(Request(id=name, prompt_token_ids=[1, 2], params=SamplingParams()))
        bench.profiler.updated([RequestUpdate("before", [3], "stop")], time.monotonic())  # over before it opened
        await bench.start(None)
        with pytest.raises(ProfileConflict, match="under way"):
            await bench.start(None)
        bench.profiler.updated([RequestUpdate("during", [3])], time.monotonic())
        bench.ranks.step()
        bench.profiler.ended("during")
        first, second = await asyncio.gather(bench.stop(), bench.stop())
        assert first == second
        assert (first.steps, first.ranks, first.full_of) == (1, 4, None)
        [file] = tmp_path.iterdir()
        assert (str(file), file.stat().st_size) == (first.file, first.bytes)
        slices = read_trace(str(file))
        assert {s.process for s in slices if s.name == "step"} == {f"rank {rank}" for rank in range(4)}
        assert {s.track.partition(": ")[2] for s in slices if s.category == "request"} == {"during"}
        with pytest.raises(ProfileConflict, match="no profile"):
            await bench.stop()

    in_loop(work)


def test_a_full_window_is_written_by_itself_and_kept_for_whoever_stops_it(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        await bench.start(2)
        for _ in range(5):
            bench.ranks.step()
        while not list(tmp_path.glob("*.gz")):
            await asyncio.sleep(0.01)
        trace = await bench.stop()
        assert (trace.steps, trace.full_of) == (2, "steps")
        with pytest.raises(ProfileConflict):
            await bench.stop()
        await bench.start(None)  # and another one
        bench.ranks.step()
        full_file(next(tmp_path.glob(".recording-*"))).touch()
        while bench.ranks.order is not None:  # all are told to stop
            await asyncio.sleep(0.01)
        trace = await bench.stop()
        assert (trace.steps, trace.full_of) == (1, "bytes")

    in_loop(work)


def test_without_a_step_nothing_is_written(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        await bench.start(None)
        assert await bench.stop() == Trace(None, 0, 0, 1, None)
        assert not list(tmp_path.iterdir())

    in_loop(work)


def test_a_rank_that_writes_nothing_is_named_and_the_next_profile_may_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler_module, "WRITE_SECONDS", 0.05)

    async def work() -> None:
        bench = Bench(tmp_path, ranks=2)
        bench.ranks.writing = [0]
        await bench.start(None)
        bench.ranks.step()
        with pytest.raises(ThalwegError, match="the trace of rank 1 was not written within"):
            await bench.stop()
        assert not list(tmp_path.iterdir())
        await bench.start(None)

    in_loop(work)


def test_what_cannot_be_recorded_or_joined_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        await bench.start(None)
        bench.ranks.step()
        write(rank_file(next(tmp_path.iterdir()), 0), [])
        with pytest.raises(ThalwegError, match="without the window's steps"):
            await bench.stop()
        await bench.start(None)
        recorded = Recorded(error="OSError: no room")
        recorded_file(next(tmp_path.iterdir()), 0).write_bytes(msgspec.json.encode(recorded))
        bench.ranks.writing = []
        with pytest.raises(ThalwegError, match="the trace of rank 0 was not written: OSError: no room"):
            await bench.stop()
        bench.ranks.order = StartRecording("elsewhere", 1)
        with pytest.raises(ThalwegError, match="is recording"):
            await bench.start(None)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ProfileConflict, match="no profile"):
            await bench.stop()

    in_loop(work)


def test_steps_and_traces_are_bounded(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path, max_steps=10)
        for steps in (0, -1, 11):
            with pytest.raises(InvalidRequest):
                await bench.start(steps)
        for i in range(profiler_module.MAX_TRACES):
            (tmp_path / f"trace-{i}.json.gz").touch()
        with pytest.raises(ProfileConflict, match="remove some"):
            await bench.start(None)

    in_loop(work)


def test_a_profiler_that_is_closed_leaves_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        await bench.start(None)
        bench.ranks.step()
        await bench.profiler.close()
        assert not list(tmp_path.iterdir())

    in_loop(work)


def test_whoever_waits_for_a_profile_of_an_engine_that_is_lost_hears_of_it(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        bench.ranks.writing = []
        await bench.start(None)
        stop = asyncio.ensure_future(bench.stop())
        await asyncio.sleep(0.05)
        bench.profiler.lost = EngineDeadError("it died")
        with pytest.raises(EngineDeadError, match="it died"):
            await stop

    in_loop(work)
