"""Runs a kernel in CUDA C++ on the host, its threads taking turns (host/hopper.cuh), where there is no GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from torch import Tensor

from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.tensor_map import TensorMap

HEADERS = Path(__file__).parent / "host"
# Blocks that tell each other something; those of other kernels run one after another.
TOGETHER = {"states": 4, "gdn_states": 2, "gdn_prompt": 4}
WRONG = {
    1: "too much shared memory",
    2: "wrote past its shared memory",
    4: "not every thread waited once, or a block let no kernel start",
}


@cache
def _libraries(source: Path, name: str, macros: tuple[tuple[str, int], ...]) -> list[Any]:
    """One for each block that runs at a time: shared memory is static there."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = Path(mkdtemp())
    code = re.sub(r"extern __shared__ __align__\(\d+\) u8 shared\[\];", "", source.read_text())
    arguments = "first, blocks, grid, threads, shared_bytes, args"
    code += '\nextern "C" int run(int first, int blocks, int grid, int threads, int shared_bytes, void** args) {\n'
    code += f"    return run_kernel<{name}>({arguments});\n}}\n"
    (folder / "kernel.cpp").write_text(code)
    command = [
        compiler,
        "-O0",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-fno-gnu-unique",
        "-w",
        "-I",
        str(HEADERS),
        "-I",
        str(source.parent),
        "-I",
        str(cuda_build.HEADERS[0].parent),  # for headers that need no substitute
    ]
    command += [f"-D{key}={value}" for key, value in macros]
    run = subprocess.run([*command, "kernel.cpp", "-o", "kernel.so"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    libraries = []
    for i in range(TOGETHER.get(name, 1)):
        shutil.copy(folder / "kernel.so", folder / f"kernel{i}.so")
        libraries.append(ctypes.CDLL(str(folder / f"kernel{i}.so")))
    shutil.rmtree(folder)
    return libraries


def host_tensor_map(x_RHX: Tensor, rows: int, heads: int = 1) -> TensorMap:
    """In place of `tensor_map`: what the host's `copy_tile` reads."""
    assert x_RHX.data_ptr() % 16 == 0
    assert all(2 * n % 16 == 0 for n in x_RHX.stride()[:2])
    (R, H, X), strides = x_RHX.shape, x_RHX.stride()
    return TensorMap((ctypes.c_uint64 * 16)(x_RHX.data_ptr(), R, H, X, strides[0], strides[1], rows, heads))


class HostKernel:
    """In place of a CudaKernel: `cuda_kernel` of a module that launches is to be this class."""

    def __init__(self, source: Path, name: str, threads: int, device: object, **macros: int) -> None:
        self._libraries, self._threads = _libraries(source, name, tuple(macros.items())), threads

    def launch(self, grid: tuple[int, int, int], shared_bytes: int, *args: Tensor | tuple[Any, Any]) -> None:
        values = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a[0](a[1]) if a[0] else a[1] for a in args
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

        def run(library: Any, first: int, blocks: int) -> None:
            code = library.run(first, blocks, grid[0], self._threads, shared_bytes, addresses)
            failure = (ctypes.c_char * 200).in_dll(library, "failure_of_kernel").value.decode()
            assert code == 0, WRONG.get(code, failure)

        count = len(self._libraries)
        if count == 1:
            run(self._libraries[0], 0, grid[0])
            return
        with ThreadPoolExecutor(count) as pool:
            for first in range(0, grid[0], count):
                blocks = range(first, min(first + count, grid[0]))
                list(pool.map(lambda b: run(self._libraries[b % count], b, 1), blocks))
