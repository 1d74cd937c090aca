"""Compiles the kernels of a rehearsed step many at a time: one after another they are most of a first start."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MAX_THREADS = 32
_lock = threading.Lock()
_under_way: list[Any] = []  # for each rehearsal in this process, what launched before the first of them began
_EMPTY_TO_ZEROS = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}


@contextmanager
def compiled_together() -> Iterator[None]:
    """Inside, Triton kernels of this thread are handed to threads that compile them and are not launched; at the end
    all are ready. Other threads, as those of another engine, launch theirs as ever.

    What a kernel would have written is zeros instead, in tensors made by torch.empty and its kin, so that ids taken
    from them stay in range. Without Triton, or with one that compiles on one thread alone, this does nothing.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        yield
        return
    with ExitStack() as stack:
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        stack.enter_context(AsyncCompileMode(stack.enter_context(ThreadPoolExecutor(threads, "thalweg-compile"))))
        stack.enter_context(_Zeros())
        stack.enter_context(_not_launched())
        yield


@contextmanager
def _not_launched() -> Iterator[None]:
    """Inside, what this thread launches is compiled alone."""
    from triton.runtime._async_compile import active_mode
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        # The mode is a thread's own; this function is everybody's.
        return launch(self, *args, grid=grid, warmup=warmup or active_mode.get() is not None, **options)

    with _lock:
        launch = _under_way[0] if _under_way else JITFunction.run
        _under_way.append(launch)
        JITFunction.run = run
    try:
        yield
    finally:
        with _lock:
            _under_way.pop()
            if not _under_way:  # the last puts it back: rehearsals of two engines may overlap
                JITFunction.run = launch


class _Zeros(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _EMPTY_TO_ZEROS.get(func, func)(*args, **(kwargs or {}))
