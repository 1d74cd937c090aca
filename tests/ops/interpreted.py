"""Runs a check of Triton kernels under the interpreter, on the CPU, in a process of its own.

Kernels are made for the interpreter or the compiler when their module is imported, so one process cannot have both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable


def run_interpreted(*checks: Callable[[], None]) -> None:
    """Call these module-level functions of one module, in order, in a fresh interpreting process."""
    module = checks[0].__module__
    calls = "; ".join(f"m.{check.__name__}()" for check in checks)
    code = f"from tests.ops.interpreted import repair; repair(); import {module} as m; {calls}"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]


def repair() -> None:
    """Let loops run to bounds that were loaded: numpy 2.4 no longer turns an array of one element into an int."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_and_repair
