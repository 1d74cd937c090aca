"""Runs a check of Triton kernels under the interpreter, on the CPU, in a process of its own.

Kernels are made for the interpreter or the compiler when their module is imported, so one process cannot have both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from tests.forked import CONTEXT

SECONDS = 120  # for each check


def run_interpreted(*checks: Callable[[], None]) -> None:
    """Call these module-level functions, in order, in a fresh interpreting process."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=_interpret) as pool:
        try:
            for check in checks:
                pool.submit(check).result(SECONDS)
        except BaseException:
            for process in pool._processes.values():
                process.kill()  # one that hangs would be waited for
            raise


def _interpret() -> None:
    """Also lets loops run to bounds that were loaded: numpy 2.4 no longer turns an array of one element into an int."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_and_repair
