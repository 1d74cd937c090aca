"""Compiles a CUDA C++ source for Hopper where there is no GPU, and reads what ptxas says of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from thalweg.ops.toolchain.cuda_build import HEADERS


@dataclass(frozen=True)
class CompiledCuda:
    registers: int
    spilled_bytes: int
    static_shared_bytes: int
    serialized: bool  # products of the matrix unit that could overlap wait for one another


def compile_cuda(source: Path, folder: Path, **macros: int) -> CompiledCuda:
    """With nvcc, which has the compiler that NVRTC has. Skips the test where it is not installed."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [nvcc, "-cubin", "-arch=sm_90a", "-use_fast_math", "--ptxas-options=-v", str(source)]
    command += ["-I", str(HEADERS[0].parent)]
    command += ["-o", f"{folder}/k.cubin", *(f"-D{key}={value}" for key, value in macros.items())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    found = re.search(r"Used (\d+) registers(?:.* (\d+) bytes smem)?", run.stderr)
    assert found is not None, run.stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", run.stderr))
    return CompiledCuda(int(found[1]), spilled, int(found[2] or 0), "instructions are serialized" in run.stderr)
