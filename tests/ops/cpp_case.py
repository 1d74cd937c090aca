"""The CPU's C++ ops at each set of instructions that this processor has."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from thalweg.ops.activation import cpp as activation
from thalweg.ops.attention.gqa import cpp as gqa
from thalweg.ops.attention.mla import cpp as mla
from thalweg.ops.attention.mla_down_norms import cpp as mla_down_norms
from thalweg.ops.attention.mla_mixer import cpp as mla_mixer
from thalweg.ops.delta import mixer_cpp, prefill_cpp
from thalweg.ops.embedding import cpp as embedding
from thalweg.ops.linear import blocks_cpp
from thalweg.ops.linear import cpp as linear
from thalweg.ops.moe.experts import cpp as experts
from thalweg.ops.moe.router import cpp as router
from thalweg.ops.norm import cpp as norm
from thalweg.ops.registry import Where
from thalweg.ops.residual import cpp as residual
from thalweg.ops.sample import cpp as sample
from thalweg.ops.toolchain import cpu_build

MODULES: list[ModuleType] = [
    activation,
    blocks_cpp,
    embedding,
    experts,
    gqa,
    linear,
    mixer_cpp,
    mla,
    mla_down_norms,
    mla_mixer,
    norm,
    prefill_cpp,
    residual,
    router,
    sample,
]
WHY_NOT = cpu_build.why_not(Where("cpu", "float32"))
needs_cpp = pytest.mark.skipif(WHY_NOT is not None, reason=f"C++ for the CPU: {WHY_NOT}")
HAD = [level for level in cpu_build.levels() if level.flags <= cpu_build.processor_flags()]
# avx512_bf16 has all of avx512_vnni, whose code differs by what it lacks, as that of avx512 does.
LEVELS = [level for level in HAD if level.name != "avx512_vnni" or level is HAD[0]]
WRITES = 'for out; do :; done; echo library > "$out"'  # a compiler's last argument


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
        for name in ("_run", "_many", "_kda", "_gdn", "_prepare", "_prefill"):
            if hasattr(module, name):
                getattr(module, name).cache_clear()


@pytest.fixture(name="cache")
def cpp_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder not yet made, and a compiler that makes something at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", program(tmp_path / "c++", WRITES))
    return tmp_path / "cache" / "thalweg"


def program(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
