"""A bounded window of torch's profiler around some of a runner's launches, with modules and engine spans in it."""

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
from thalweg.core import StepPlan, StepResult
from thalweg.profiler.summary import STEP
from thalweg.runner.step import ModelRunner


def start_profiler() -> None:
    """Record nothing, once, on the thread that imported torch, which the profiler wants for its own start; that also
    keeps the start out of every later window."""
    with profile(activities=[ProfilerActivity.CPU]):
        pass


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


class WindowedRunner:
    """A runner of which some launches are recorded, on the thread that launches. Nothing is, before `arm`.

    The window opens and closes with the device idle, so that all work of its launches, and no other, is in it.
    """

    def __init__(self, runner: ModelRunner, num_steps: int) -> None:
        self._runner, self._num_steps = runner, num_steps
        self.waits = runner.waits
        self.rows: list[tuple[int, int]] = []  # decode rows and prompt tokens of each recorded launch
        self.began_ns = self.ended_ns = 0  # time.perf_counter_ns of the first recorded launch and of the end
        self.closed = False
        self._plain: int | None = None  # launches without a prefill to wait for, once armed
        self._profile: Any = None
        self._spans = ExitStack()

    def arm(self, after: int) -> None:
        """Open before the launch that follows `after` launches of decode rows alone."""
        self._plain = after

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        if self._profile is None and self._plain is not None and not self.closed:
            if self._plain <= 0:
                self._open()
            elif not plan.prefills:
                self._plain -= 1
        if self._profile is None or self.closed:
            return self._runner.launch(plan)
        with record_function(STEP):
            self.began_ns = self.began_ns or time.perf_counter_ns()
            finish = self._runner.launch(plan)
        self.rows.append((len(plan.decode_slots), sum(p.length for p in plan.prefills)))
        if len(self.rows) == self._num_steps:
            self._close()
        return finish

    def close(self) -> None:
        if self._profile is not None and not self.closed:
            self._close()
        self._runner.close()

    def export(self, file: Path) -> None:
        """Write what was recorded as a Chrome trace. Only after the window closed."""
        self._profile.export_chrome_trace(str(file))

    def _open(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.waits:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        # The engine plans on another thread than the one that launches and opens the window.
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(activities=activities, experimental_config=threads)
        self._profile.start()
        self._spans.enter_context(tracing.forward(record_function))
        if isinstance(self._runner.model, nn.Module):
            self._spans.enter_context(module_names(self._runner.model))

    def _close(self) -> None:
        if self.waits:
            torch.cuda.synchronize()
        self._spans.close()
        self.ended_ns = time.perf_counter_ns()
        self._profile.stop()
        self.closed = True
