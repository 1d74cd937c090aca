"""A window of torch's profiler around some of a rank's steps, with modules and engine spans in it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from thalweg import tracing
from thalweg.core import SaveCache, StepPlan, StepResult
from thalweg.errors import ThalwegError
from thalweg.recorder.allocated import allocated
from thalweg.recorder.exchanges import exchange_us
from thalweg.recorder.measure import LaunchCount, fill_cache, link_bytes_per_s
from thalweg.recorder.orders import (
    CountLaunches,
    FillCache,
    MeasureExchange,
    MeasureLink,
    Order,
    Recorded,
    StartRecording,
    full_file,
    rank_file,
    recorded_file,
)
from thalweg.runner.lock_step import Agreed
from thalweg.runner.step import ModelRunner
from thalweg.tracing import STEP


@contextmanager
def module_names(model: nn.Module) -> Iterator[None]:
    """While open, each module's forward is a span "nn.Module: ClassName_i", i counted by class in the model's order."""
    counts: Counter[str] = Counter()
    under_way: list[Any] = []  # one thread runs the model
    with ExitStack() as hooks:
        for module in model.modules():
            kind = type(module).__name__
            name = f"nn.Module: {kind}_{counts[kind]}"
            counts[kind] += 1

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                under_way.append(record_function(name))
                under_way[-1].__enter__()

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                under_way.pop().__exit__(None, None, None)

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


class RecordedRunner:
    """A rank's runner, some of whose steps are recorded, on the thread that launches them.

    A recording begins and ends with the device idle, so that all work of its steps, and no other, is in it. Nothing
    that goes wrong with writing it ends the rank.
    """

    def __init__(self, runner: ModelRunner, rank: int = 0, tells_full: bool = True) -> None:
        """`rank` counts those of all data-parallel ranks. `tells_full`: of an engine, one rank does."""
        self._runner, self._rank, self._tells_full = runner, rank, tells_full
        self.waits = runner.waits
        self._window: Window | None = None
        self._counting: LaunchCount | None = None

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        with self._step(len(plan.decode_slots), sum(p.length for p in plan.prefills)):
            return self._runner.launch(plan)

    def serve_others(self) -> None:
        """As ModelRunner.serve_others."""
        with self._step(0, 0):
            self._runner.serve_others()

    def agree(self, agreed: Agreed) -> None:
        """As ModelRunner.agree."""
        with self._step(0, 0) if agreed.idle else nullcontext():
            self._runner.agree(agreed)

    def obey(self, order: Order) -> int | float | list[float] | str | None:
        """Start a recording, or end it; or do what benchmarks ask for. Raises ThalwegError if one is under way."""
        if isinstance(order, FillCache):
            fill_cache(self._runner)
            return None
        if isinstance(order, CountLaunches):
            return self._count(order.begin)
        if isinstance(order, MeasureLink):
            return link_bytes_per_s(self._runner, order.size)
        if isinstance(order, MeasureExchange):
            return exchange_us(self._runner, order)
        if isinstance(order, SaveCache):
            self._runner.save_cache(order)
            return None
        if isinstance(order, StartRecording):
            if self._window is not None:
                raise ThalwegError(f"rank {self._rank} is recording")
            self._window = Window(self._runner, order)
        elif self._window is not None:
            self._end()
        return None

    def _count(self, begin: bool) -> int | None:
        if begin:
            self._counting = LaunchCount() if self.waits else None
            return None
        counting, self._counting = self._counting, None
        return None if counting is None else counting.stop()

    def close(self) -> None:
        if self._window is not None:
            self._window.close()
        self._runner.close()

    def _step(self, rows: int, tokens: int) -> AbstractContextManager[None]:
        return nullcontext() if self._window is None else self._recorded(self._window, rows, tokens)

    @contextmanager
    def _recorded(self, window: Window, rows: int, tokens: int) -> Iterator[None]:
        with window.step(rows, tokens):
            yield
        if len(window.rows) >= window.order.steps:
            self._end()
        elif self._tells_full and window.is_full():
            full_file(Path(window.order.folder)).touch()

    def _end(self) -> None:
        window, self._window = self._window, None
        assert window is not None
        folder, rank = Path(window.order.folder), self._rank
        try:
            recorded = window.close()
            if recorded.rows and window.order.folder:
                _whole(rank_file(folder, rank), lambda path: window.profile.export_chrome_trace(str(path)))
        except Exception as e:  # noqa: BLE001 -- of torch's profiler, or of the disk
            recorded = Recorded(error=f"{type(e).__name__}: {e}")
        if window.order.folder:
            with contextlib.suppress(OSError):  # then it is missed
                _whole(recorded_file(folder, rank), lambda path: path.write_bytes(msgspec.json.encode(recorded)))


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    """Whoever sees the file sees all of it."""
    unfinished = file.with_name(f"unfinished-{file.name}")
    write(unfinished)
    unfinished.rename(file)


class Window:
    """Records from now to `close`."""

    def __init__(self, runner: ModelRunner, order: StartRecording) -> None:
        self.order, self.rows = order, list[tuple[int, int]]()
        self._waits, self._began_ns, self._allocated = runner.waits, 0, allocated()
        activities = [ProfilerActivity.CPU]
        if runner.waits:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        # The engine plans on another thread than the one that launches and records.
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self.profile = profile(activities=activities, experimental_config=threads)
        self.profile.start()
        self._spans = ExitStack()
        self._spans.enter_context(tracing.forward(record_function))
        if isinstance(runner.model, nn.Module):
            self._spans.enter_context(module_names(runner.model))

    @contextmanager
    def step(self, rows: int, tokens: int) -> Iterator[None]:
        with record_function(STEP):
            self._began_ns = self._began_ns or time.perf_counter_ns()
            self.rows.append((rows, tokens))
            yield

    def is_full(self) -> bool:
        most = self.order.bytes
        return most is not None and allocated() - self._allocated > most

    def close(self) -> Recorded:
        if self._waits:
            torch.cuda.synchronize()
        self._spans.close()
        ended_ns = time.perf_counter_ns()
        self.profile.stop()
        return Recorded(self.rows, self._began_ns, ended_ns if self.rows else 0)
