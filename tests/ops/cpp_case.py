"""The CPU's C++ ops at each set of instructions that this processor has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from thalweg.ops.activation import cpp as activation
from thalweg.ops.attention.gqa import cpp as gqa
from thalweg.ops.attention.mla_mixer import cpp as mla_mixer
from thalweg.ops.delta import mixer_cpp
from thalweg.ops.linear import blocks_cpp
from thalweg.ops.linear import cpp as linear
from thalweg.ops.moe.experts import cpp as experts
from thalweg.ops.moe.router import cpp as router
from thalweg.ops.norm import cpp as norm
from thalweg.ops.registry import Where
from thalweg.ops.sample import cpp as sample
from thalweg.ops.toolchain import cpu_build

MODULES: list[ModuleType] = [activation, blocks_cpp, experts, gqa, linear, mixer_cpp, mla_mixer, norm, router, sample]
WHY_NOT = cpu_build.why_not(Where("cpu", "float32"))
needs_cpp = pytest.mark.skipif(WHY_NOT is not None, reason=f"C++ for the CPU: {WHY_NOT}")
LEVELS = [level for level in cpu_build.levels() if level.flags <= cpu_build.processor_flags()]


@contextmanager
def instructions(level: cpu_build.Level) -> Iterator[None]:
    """Inside, the wrappers call the library for these instructions."""
    library = ctypes.CDLL(str(cpu_build.built(level)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "_loaded", lambda: library)
        _forget()
        try:
            yield
        finally:
            _forget()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _forget() -> None:
    """The functions that wrappers remember."""
    for module in MODULES:
        for name in ("_run", "_kda", "_gdn"):
            if hasattr(module, name):
                getattr(module, name).cache_clear()
