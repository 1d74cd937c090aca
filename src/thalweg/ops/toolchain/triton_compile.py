"""Makes the kernels of a rehearsed step ready many at a time: one after another they are most of a first start."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

MAX_THREADS = 32
SWITCH_S = 0.0005  # how long a thread that compiles may keep the interpreter from the one that rehearses
_lock = threading.Lock()
_loading = threading.Lock()
_here = threading.local()
# For each rehearsal in this process, what was there before the first of them began: they may overlap, and the last to
# end puts it back.
_under_way: list[Any] = []
_switch_intervals: list[float] = []
_EMPTY_TO_ZEROS = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}


@contextmanager
def compiled_together() -> Iterator[None]:
    """Inside, Triton kernels of this thread are handed to threads that compile and load them and are not launched; at
    the end all are ready. Those in CUDA C++ are compiled there too (`beside`), and not launched either (`rehearsing`).
    Other threads, as those of another engine, launch theirs as ever.

    What a kernel would have written is zeros instead, in tensors made by torch.empty and its kin, so that ids taken
    from them stay in range. Without Triton, or with one that compiles on one thread alone, this does nothing.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode, active_mode
    except ImportError:
        yield
        return
    with ExitStack() as stack:
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        pool = stack.enter_context(ThreadPoolExecutor(threads, "thalweg-compile", _join_device, (_device(),)))
        stack.enter_context(_switching_often())
        loader = stack.enter_context(ThreadPoolExecutor(1, "thalweg-load", _join_device, (_device(),)))
        stack.callback(active_mode.set, active_mode.get())  # which it leaves as it is when a kernel fails
        stack.enter_context(AsyncCompileMode(_Loading(pool, loader)))
        stack.enter_context(_Zeros())
        stack.enter_context(_not_launched())
        futures: list[Future[Any]] = []
        _here.rehearsing, _here.beside = True, pool
        _here.futures = futures
        try:
            yield
        finally:
            _here.rehearsing = False
        for future in futures:
            future.result()


def rehearsing() -> bool:
    """Whether this thread is inside compiled_together(), where tensors that a kernel would have written are zeros: ids
    that another one takes for different ones are not."""
    return getattr(_here, "rehearsing", False)


def beside(compile: Callable[[], T]) -> Future[T]:
    """Have `compile` called by a thread of the rehearsal that this thread is in, which ends once it is done."""
    future: Future[T] = _here.beside.submit(compile)
    _here.futures.append(future)
    return future


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _join_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


class _Loading(Executor):
    """What is compiled on `pool` is then loaded on `loader`, while others compile: for each signature Triton has a C
    compiler make a launcher, which would otherwise happen at a kernel's first launch.

    One at a time: when two make the launcher of one signature at once, the second replaces the file that the first is
    loading; CPython, which tells extension modules apart by inode, may then take the next one for this.
    """

    def __init__(self, pool: Executor, loader: Executor) -> None:
        self._pool, self._loader = pool, loader

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()

        def load(kernel: Any) -> None:
            try:
                with _loading:
                    getattr(kernel, "run", None)  # a property that loads
                done.set_result(kernel)
            except BaseException as e:  # noqa: BLE001 -- whoever waits for the kernel raises it
                done.set_exception(e)

        def compile_it() -> None:
            try:
                self._loader.submit(load, fn(*args, **kwargs))
            except BaseException as e:  # noqa: BLE001 -- whoever waits for the kernel raises it
                done.set_exception(e)

        self._pool.submit(compile_it)
        return done


@contextmanager
def _switching_often() -> Iterator[None]:
    with _lock:
        before = _switch_intervals[0] if _switch_intervals else sys.getswitchinterval()
        _switch_intervals.append(before)
        sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        with _lock:
            _switch_intervals.pop()
            if not _switch_intervals:
                sys.setswitchinterval(before)


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
            if not _under_way:
                JITFunction.run = launch


class _Zeros(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _EMPTY_TO_ZEROS.get(func, func)(*args, **(kwargs or {}))
