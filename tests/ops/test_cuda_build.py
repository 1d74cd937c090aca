"""Machine code of CUDA C++ sources is kept between processes, apart for each source, option and compiler, and a launch
that fails says which kernel it was and why."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes import addressof, c_float, c_int, c_longlong, c_void_p, sizeof
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.toolchain import cuda_build, launch
from thalweg.ops.toolchain.counters import counters
from thalweg.ops.toolchain.tensor_map import TensorMap
from thalweg.ops.toolchain.triton_compile import compiled_together


def test_a_source_is_compiled_once_for_all_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    compiled: list[tuple[str, str, dict[str, int]]] = []

    def compile_cubin(source: Path, arch: str, **macros: int) -> bytes:
        compiled.append((source.read_text(), arch, macros))
        return f"code {len(compiled)}".encode()

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_build, "compile_cubin", compile_cubin)
    monkeypatch.setattr(cuda_build, "_compiler_version", lambda: (13, 0))
    source = tmp_path / "kernel.cu"
    source.write_text("one")
    asked: list[tuple[str, dict[str, Any]]] = [("sm_90", {"A": 1}), ("sm_90", {"A": 2}), ("sm_100", {"A": 1})]
    first = [cuda_build.cached_cubin(source, arch, **macros) for arch, macros in asked]
    assert first == [b"code 1", b"code 2", b"code 3"]
    assert [cuda_build.cached_cubin(source, arch, **macros) for arch, macros in asked] == first
    source.write_text("two")
    assert cuda_build.cached_cubin(source, "sm_90", A=1) == b"code 4"
    monkeypatch.setattr(cuda_build, "_compiler_version", lambda: (13, 1))
    assert cuda_build.cached_cubin(source, "sm_90", A=1) == b"code 5"
    assert len(compiled) == 5


CUresult = IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_INVALID_VALUE": 1, "CUDA_ERROR_INVALID_IMAGE": 200})
WORDS = {1: b"invalid argument", 200: b"device kernel image is invalid"}


class Driver(ModuleType):
    """Stands in for cuda.bindings.driver; `results` says what a call gives in place of success."""

    def __init__(self) -> None:
        super().__init__("driver")
        self.results: dict[str, int] = {}
        self.launched: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "CUresult":
            return CUresult
        if name.startswith("CU"):
            return SimpleNamespace(**dict.fromkeys(ATTRIBUTES, 0))
        return lambda *args: self._call(name, *args)

    def _call(self, name: str, *args: Any) -> tuple[Any, ...]:
        status = CUresult(self.results.get(name, 0))
        if name == "cuGetErrorName":
            return CUresult(0), CUresult(args[0]).name.encode()
        if name == "cuGetErrorString":
            return CUresult(0), WORDS[args[0]]
        if name == "cuLaunchKernelEx":
            self.launched.append(args)
            return (status,)
        found = {"cuDeviceGetAttribute": 232448, "cuFuncGetAttribute": 1024, "cuModuleGetFunction": 5}
        return status, found.get(name)

    def cuLaunchKernelEx(self, *args: Any) -> int:  # noqa: N802 -- of the driver itself, not of its bindings
        return int(self._call("cuLaunchKernelEx", *args)[0])


ATTRIBUTES = [
    "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES",
    "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
    "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED",
]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found, bindings = Driver(), ModuleType("cuda.bindings")
    bindings.driver = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(cuda_build, "cached_cubin", lambda *_, **__: b"code")
    monkeypatch.setattr(cuda_build, "_runtime", lambda: None)
    monkeypatch.setattr(launch, "driver", lambda: found)
    return found


def test_a_launch_that_the_driver_refuses_says_which_and_why(driver: Driver) -> None:
    kernel = cuda_build.CudaKernel(Path("some.cu"), "few", 256)
    kernel.launch((3, 2, 1), 64, torch.zeros(1))
    assert len(driver.launched) == 1
    driver.results["cuLaunchKernelEx"] = 1
    with pytest.raises(KernelError) as refused:
        kernel.launch((3, 2, 1), 300_000, torch.zeros(1))
    assert str(refused.value) == (
        "few of some.cu (grid (3, 2, 1), block (256, 1, 1), 300000 bytes of shared memory, of at most 231424)"
        " was not launched: CUDA_ERROR_INVALID_VALUE (1): invalid argument"
    )
    del driver.results["cuLaunchKernelEx"]
    kernel.launch((3, 2, 1), 64, torch.zeros(1))


def test_a_launch_tells_the_driver_all_it_was_given(driver: Driver) -> None:
    """A thread's arguments lie where they lay before; another's do not."""
    kernel, x = cuda_build.CudaKernel(Path("some.cu"), "few", 256), torch.zeros(2)
    tile = TensorMap()
    config_at = places = None

    def tell(turn: int) -> None:
        nonlocal config_at, places
        kernel.launch(
            (3, 2, turn), 64, x, (c_int, -turn), (c_float, 0.5), (None, tile), (c_longlong, 2**40 + turn), x[1:]
        )
        config_at, function, places, extra = driver.launched[-1]
        assert (function.value, extra) == (5, None)

    for turn in (1, 2):
        tell(turn)
        config = config_at._obj
        assert (config.grid_x, config.grid_y, config.grid_z) == (3, 2, turn)
        assert (config.block_x, config.block_y, config.block_z) == (256, 1, 1)
        assert (config.shared_bytes, config.stream, config.num_attributes) == (64, 7, 1)
        attribute = (c_int * 18).from_address(config.attributes)  # programmatic stream serialization, allowed
        assert list(attribute[:3]) == [6, 0, 1]
        assert (sizeof(config), sizeof(attribute)) == (56, 72)
        at = [c_void_p.from_address(place).value for place in (places[0], places[5])]
        assert at == [x.data_ptr(), x.data_ptr() + 4]
        assert c_int.from_address(places[1]).value == -turn
        assert c_float.from_address(places[2]).value == 0.5
        assert places[3] == addressof(tile)
        assert c_longlong.from_address(places[4]).value == 2**40 + turn
    mine = addressof(places)
    other = threading.Thread(target=tell, args=(3,))
    other.start()
    other.join()
    assert addressof(places) != mine


def test_an_error_that_the_runtime_keeps_is_told_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [700, 0]
    runtime = SimpleNamespace(
        cudaGetLastError=lambda: codes.pop(0),
        cudaGetErrorName=lambda code: b"cudaErrorIllegalAddress",
        cudaGetErrorString=lambda code: b"an illegal memory access was encountered",
    )
    monkeypatch.setattr(cuda_build, "_runtime", lambda: runtime)
    kernel = cuda_build.CudaKernel(Path("some.cu"), "few", 256)
    said = r"before few of some.cu .* another call failed: cudaErrorIllegalAddress \(700\): an illegal memory access"
    with pytest.raises(KernelError, match=said):
        kernel.launch((1, 1, 1), 0)
    kernel.launch((1, 1, 1), 0)


def test_a_kernel_that_cannot_be_loaded_says_which_and_why(driver: Driver) -> None:
    driver.results["cuModuleLoadData"] = 200
    said = r"few of some.cu could not be loaded: CUDA_ERROR_INVALID_IMAGE \(200\): device kernel image is invalid"
    with pytest.raises(KernelError, match=said):
        cuda_build.CudaKernel(Path("some.cu"), "few", 256)


def test_kernels_met_in_a_rehearsal_compile_beside_it_and_are_loaded_when_they_are_launched(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton.runtime._async_compile")
    go, threads, loaded = threading.Event(), [], []

    def compile(*_: Any, **__: Any) -> bytes:
        assert go.wait(10)
        threads.append(threading.current_thread().name)
        return b"code"

    monkeypatch.setattr(cuda_build, "cached_cubin", compile)
    load = driver.cuModuleLoadData
    monkeypatch.setattr(driver, "cuModuleLoadData", lambda code: loaded.append(code) or load(code), raising=False)
    with compiled_together():
        kernel, other = (cuda_build.CudaKernel(Path("some.cu"), name, 256) for name in ("few", "many"))
        kernel.launch((1, 1, 1), 0)
        go.set()
        assert other.shared_limit == 231424  # which some have to know: it waits
    assert len(threads) == 2
    assert all(name.startswith("thalweg-compile") for name in threads)
    assert (loaded, driver.launched) == ([b"code"], [])
    kernel.launch((1, 1, 1), 0)
    assert (loaded, len(driver.launched)) == ([b"code"] * 2, 1)


@pytest.mark.gpu
def test_a_launch_with_too_much_shared_memory_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    source = tmp_path / "fill.cu"
    source.write_text('extern "C" __global__ void fill(float *x) { x[threadIdx.x] = 1.0f; }')
    x = torch.zeros(32, device="cuda")  # before the kernel, which is loaded into the context that torch makes
    kernel = cuda_build.CudaKernel(source, "fill", 32)
    said = rf"fill of fill.cu .*{kernel.shared_limit + 1} bytes.* was not launched: CUDA_ERROR_INVALID_VALUE \(1\)"
    with pytest.raises(KernelError, match=said):
        kernel.launch((1, 1, 1), kernel.shared_limit + 1, x)
    assert cuda_build._runtime() is not None
    kernel.launch((1, 1, 1), 0, x)  # the device is as well as before
    assert x.sum().item() == 32


def test_ranks_of_two_engines_count_apart() -> None:
    def found() -> Tensor:
        return counters("a kernel", torch.device("cpu"), 3)

    mine = found()
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(found).result()
    mine[0] = 1
    assert theirs.tolist() == [0, 0, 0]
    assert found() is mine


def test_what_a_failed_rank_has_counted_is_not_another_ones() -> None:
    def count() -> list[int]:
        found = counters("a kernel of a rank", torch.device("cpu"), 1)
        found += 1
        return found.tolist()

    for _ in range(3):  # whose threads have the same number, one after another
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(count).result() == [1]
