"""A rehearsal holds back the launches of its own thread and nobody else's."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch

from thalweg.ops.toolchain.triton_compile import beside, compiled_together, rehearsing


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(kernel, whether it was only compiled) of every launch, instead of a launch."""
    pytest.importorskip("triton.runtime._async_compile")
    from triton.runtime.jit import JITFunction

    seen: list[tuple[str, bool]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool) -> None:
        seen.append((kernel, warmup))

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def launch(kernel: str) -> None:
    from triton.runtime.jit import JITFunction

    run: Any = JITFunction.run
    run(kernel, grid=(1,), warmup=False)


def in_a_thread(fn: Any, *args: Any) -> None:
    thread = threading.Thread(target=fn, args=args)
    thread.start()
    thread.join()


def test_other_threads_launch_while_one_rehearses(launched: list[tuple[str, bool]]) -> None:
    with compiled_together():
        launch("mine")
        in_a_thread(launch, "another's")
    launch("after")
    assert launched == [("mine", True), ("another's", False), ("after", False)]


def test_rehearsals_that_overlap_end_in_any_order(launched: list[tuple[str, bool]]) -> None:
    begun, end = threading.Event(), threading.Event()
    interval = sys.getswitchinterval()

    def other() -> None:
        with compiled_together():
            begun.set()
            assert end.wait(10)
            launch("other")

    thread = threading.Thread(target=other)
    with compiled_together():
        thread.start()
        assert begun.wait(10)
    end.set()
    thread.join()
    launch("after")
    assert launched == [("other", True), ("after", False)]
    assert sys.getswitchinterval() == interval


def test_a_thread_knows_whether_it_rehearses() -> None:
    pytest.importorskip("triton.runtime._async_compile")
    seen: list[bool] = []
    with compiled_together():
        seen.append(rehearsing())
        in_a_thread(lambda: seen.append(rehearsing()))
    seen.append(rehearsing())
    assert seen == [True, False, False]


def test_what_a_kernel_would_have_written_is_zeros() -> None:
    pytest.importorskip("triton.runtime._async_compile")
    with compiled_together():
        made = torch.empty(3, dtype=torch.int64), torch.empty_like(torch.ones(3)), torch.ones(1).new_empty(3)
        assert not any(x.any() for x in made)


def test_kernels_are_loaded_one_at_a_time() -> None:
    pytest.importorskip("triton.runtime._async_compile")
    from triton.runtime._async_compile import active_mode

    threads: list[str] = []

    class Kernel:
        @property
        def run(self) -> None:
            threads.append(threading.current_thread().name)

    kernels: list[Any] = []
    with compiled_together():
        for key in range(20):
            active_mode.get().submit(key, Kernel, kernels.append)
    assert [type(kernel) for kernel in kernels] == [Kernel] * 20
    assert len(threads) == 20
    assert set(threads) == {"thalweg-load_0"}


@pytest.mark.parametrize("at", ["compile", "load"])
def test_a_kernel_that_fails_ends_the_rehearsal_with_its_error(at: str) -> None:
    pytest.importorskip("triton.runtime._async_compile")
    from triton.runtime._async_compile import active_mode

    class Kernel:
        def __init__(self) -> None:
            if at == "compile":
                raise RuntimeError("compile")

        @property
        def run(self) -> None:
            raise RuntimeError("load")

    def rehearse() -> None:
        with compiled_together():
            active_mode.get().submit("key", Kernel, lambda kernel: None)

    with pytest.raises(RuntimeError, match=at):
        rehearse()
    assert not rehearsing()
    assert active_mode.get() is None


def test_what_compiles_beside_a_rehearsal_is_done_at_its_end() -> None:
    pytest.importorskip("triton.runtime._async_compile")
    go, threads = threading.Event(), []

    def compile() -> bytes:
        assert go.wait(10)
        threads.append(threading.current_thread().name)
        return b"code"

    with compiled_together():
        futures = [beside(compile) for _ in range(3)]
        assert not futures[0].done()
        go.set()
    assert [future.result(0) for future in futures] == [b"code"] * 3
    assert all(name.startswith("thalweg-compile") for name in threads)

    def rehearse() -> None:
        with compiled_together():
            beside(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        rehearse()
    assert not rehearsing()
