"""Compiles the kernels of a rehearsed step many at a time: one after another they are most of a first start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MAX_THREADS = 32
_EMPTY_TO_ZEROS = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}


@contextmanager
def compiled_together() -> Iterator[None]:
    """Inside, Triton kernels are handed to threads that compile them and are not launched; at the end all are ready.

    What a kernel would have written is zeros instead, in tensors made by torch.empty and its kin, so that ids taken
    from them stay in range. Without Triton, or with one that compiles on one thread alone, this does nothing.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    launch = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    with ExitStack() as stack:
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        stack.enter_context(AsyncCompileMode(stack.enter_context(ThreadPoolExecutor(threads, "thalweg-compile"))))
        stack.enter_context(_Zeros())
        JITFunction.run = compile_alone
        try:
            yield
        finally:
            JITFunction.run = launch


class _Zeros(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _EMPTY_TO_ZEROS.get(func, func)(*args, **(kwargs or {}))
