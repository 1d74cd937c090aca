"""A window of torch's profiler around a rank's launches, with modules and engine spans in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from thalweg import tracing
from thalweg.core import SaveCache, StepPlan, StepResult
from thalweg.errors import ThalwegError
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
    rank_file,
)
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
    """A rank's runner whose launches are recorded between two orders, on the thread that launches.

    A recording begins and ends with the device idle, so that all work of its launches, and no other, is in it.
    """

    def __init__(self, runner: ModelRunner, rank: int = 0) -> None:
        self._runner, self._rank = runner, rank
        self.waits = runner.waits
        self._profile: Any = None
        self._counting: LaunchCount | None = None
        self._began_ns = 0
        self._spans = ExitStack()

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        if self._profile is None:
            return self._runner.launch(plan)
        with record_function(STEP):
            self._began_ns = self._began_ns or time.perf_counter_ns()
            return self._runner.launch(plan)

    def obey(self, order: Order) -> Recorded | float | list[float] | str | None:
        """Start a recording, or stop it and write it; or what benchmarks ask for. Raises ThalwegError if there is a
        recording already, or none."""
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
        if isinstance(order, StartRecording) == (self._profile is not None):
            raise ThalwegError(f"rank {self._rank} is {'not ' * (self._profile is None)}recording")
        if isinstance(order, StartRecording):
            self._open()
            return None
        recorded, found = self._profile, self._close()
        if found.began_ns:
            unfinished = Path(order.folder) / f"unfinished-{self._rank}.json"
            recorded.export_chrome_trace(str(unfinished))
            unfinished.rename(rank_file(Path(order.folder), self._rank))  # whoever sees it sees all of it
        return found

    def _count(self, begin: bool) -> int | None:
        if begin:
            self._counting = LaunchCount() if self.waits else None
            return None
        counting, self._counting = self._counting, None
        return None if counting is None else counting.stop()

    def close(self) -> None:
        if self._profile is not None:
            self._close()
        self._runner.close()

    def _open(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.waits:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        # The engine plans on another thread than the one that launches and records.
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        recording = profile(activities=activities, experimental_config=threads)
        recording.start()
        self._profile, self._began_ns = recording, 0
        self._spans.enter_context(tracing.forward(record_function))
        if isinstance(self._runner.model, nn.Module):
            self._spans.enter_context(module_names(self._runner.model))

    def _close(self) -> Recorded:
        recording, self._profile = self._profile, None
        if self.waits:
            torch.cuda.synchronize()
        self._spans.close()
        ended_ns = time.perf_counter_ns()
        recording.stop()
        return Recorded(self._began_ns, ended_ns if self._began_ns else 0)
