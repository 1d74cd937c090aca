"""CUDA C++ kernels, compiled on first use by NVRTC and launched through the driver.

Both come with torch's CUDA builds for Linux (packages nvidia-cuda-nvrtc and cuda-bindings), so neither a compiler nor
CUDA's headers need be installed; a source of a few hundred lines, which includes `headers_of` it alone, takes 0.1 to
0.3 s, or a second if it has products of many sizes. What is compiled lies in Triton's kernel cache beside Triton's own
kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.registry import Refusal, Where
from thalweg.ops.toolchain.launch import Launcher
from thalweg.ops.toolchain.triton_compile import beside, rehearsing

HEADERS = tuple(Path(__file__).with_name(name) for name in ("hopper.cuh", "matrix_unit.cuh", "ranks.cuh", "choice.cuh"))


def headers_of(source: Path) -> list[Path]:
    """What a source may include: the shared headers, and those beside it."""
    return [*HEADERS, *sorted(source.parent.glob("*.cuh"))]


def why_not(where: Where) -> Refusal:
    """Why CUDA C++ kernels cannot serve there, or None. They need a Hopper GPU or later, as the Triton kernels do."""
    if where.device != "cuda":
        return f"needs cuda, not {where.device}"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return None if major >= 9 else f"needs compute capability 9.0 or later, not {major}.{minor}"


class CudaKernel:
    """One `extern "C"` kernel of a source file, compiled for the current device with the given macros: at once, or in a
    rehearsal beside it, and then loaded when it is first asked for."""

    def __init__(self, source: Path, name: str, threads: int, **macros: int) -> None:
        self.name, self._threads = f"{name} of {source.name}", threads
        major, minor = torch.cuda.get_device_capability()
        own = "a" if (major, minor) == (9, 0) else ""  # with the instructions that Hopper alone has
        read = partial(cached_cubin, source, f"sm_{major}{minor}{own}", **macros)
        self._function_name = name.encode()
        self._code: Callable[[], bytes] = read
        if rehearsing():
            self._code = beside(read).result
        else:
            self._loaded  # noqa: B018 -- whoever makes it is told if it cannot be

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a launch may ask for."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Any, int]:
        """The function, and its shared_limit."""
        from cuda.bindings import driver

        check = partial(_check, during=f"{self.name} could not be loaded")
        module = check(driver.cuModuleLoadData(self._code()))
        function = check(driver.cuModuleGetFunction(module, self._function_name))
        limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        fixed = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        shared_limit: int = check(driver.cuDeviceGetAttribute(limit, torch.cuda.current_device()))
        shared_limit -= check(driver.cuFuncGetAttribute(fixed, function))
        check(driver.cuFuncSetAttribute(function, dynamic, shared_limit))
        larger = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        check(driver.cuFuncSetAttribute(function, larger, 1))  # up to 16 blocks, of those who have clusters
        return function, shared_limit

    @cached_property
    def _launcher(self) -> Launcher:
        return Launcher(int(self._loaded[0]), self._threads)

    def launch(self, grid: tuple[int, int, int], shared_bytes: int, *args: Tensor | tuple[Any, Any]) -> None:
        """On torch's current stream, starting before the kernel ahead has ended; it must wait by griddepcontrol.wait.

        `args` are tensors, passed by address, and (ctypes type, value) pairs; the type is None of a structure of the
        driver's. In a rehearsal nothing is launched.

        Raises KernelError with the driver's code if it refuses the launch, or with the runtime's if a call before this
        one left an error: a kernel fails while the host goes on, and the next to ask is told.
        """
        if rehearsing():
            return
        status = self._launcher(grid, shared_bytes, torch.cuda.current_stream().cuda_stream, args)
        runtime = runtime_error()
        if status or runtime:
            shape = f"grid {grid}, block ({self._threads}, 1, 1), {shared_bytes} bytes of shared memory"
            this = f"{self.name} ({shape}, of at most {self.shared_limit})"
            also = f"; the runtime says {runtime}" if runtime else ""
            if not status:
                raise KernelError(f"before {this} was launched another call failed: {runtime}")
            from cuda.bindings import driver

            raise KernelError(f"{this} was not launched: {_describe(driver.CUresult(status))}{also}")


def aligned_rows(x_TD: Tensor) -> Tensor:
    """x_TD, or a copy of it if its rows do not begin where 16 bytes may be read at a time. Its last stride is 1."""
    if x_TD.data_ptr() % 16 == 0 and x_TD.stride(0) * x_TD.element_size() % 16 == 0:
        return x_TD
    return x_TD.clone(memory_format=torch.contiguous_format)


@cache
def cuda_kernel(source: Path, name: str, threads: int, device: torch.device, **macros: int) -> CudaKernel:
    """A kernel for `device`, compiled once a process for every set of macros."""
    with torch.cuda.device(device):
        return CudaKernel(source, name, threads, **macros)


def cached_cubin(source: Path, arch: str, **macros: int) -> bytes:
    """What compile_cubin gives, from Triton's cache if it is there; it is put there otherwise."""
    try:
        from triton.runtime.cache import get_cache_manager
    except ImportError:
        return compile_cubin(source, arch, **macros)
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*headers_of(source), source)))
    key.update(repr((_compiler_version(), _options(arch, macros))).encode())
    cache, name = get_cache_manager(key.hexdigest()), f"{source.stem}.cubin"
    if (path := cache.get_file(name)) is None:
        path = cache.put(compile_cubin(source, arch, **macros), name, binary=True)
    return Path(path).read_bytes()


def _compiler_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    status, *version = nvrtc.nvrtcVersion()
    _check((status,))
    major, minor = version
    return major, minor


def _options(arch: str, macros: dict[str, int]) -> list[str]:
    # Functions are the device's unless they say otherwise, as generic lambdas cannot.
    options = [f"--gpu-architecture={arch}", "--use_fast_math", "--device-as-default-execution-space"]
    return options + [f"-D{key}={value}" for key, value in macros.items()]


def compile_cubin(source: Path, arch: str, **macros: int) -> bytes:
    """Machine code of a source file for `arch`, such as "sm_90". Raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc

    options = _options(arch, macros)
    paths = headers_of(source)
    headers = ([path.read_bytes() for path in paths], [path.name.encode() for path in paths])
    program = _check(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(paths), *headers))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if result:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{source.name} does not compile for {arch} with {macros}:\n{log.decode()}")
        cubin: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _check(result: Sequence[Any], during: str = "NVRTC failed") -> Any:
    """What a call gave beside its status. Raises KernelError if the status is not success."""
    status, *values = result
    if status:
        raise KernelError(f"{during}: {_describe(status)}")
    return values[0] if values else None


def _describe(status: Any) -> str:
    """ "CUDA_ERROR_INVALID_VALUE (1): invalid argument", in the words of the driver, or of NVRTC for its own codes."""
    code = f"{status.name} ({int(status)})"
    if type(status).__name__ != "CUresult":
        return code
    from cuda.bindings import driver

    (named, name), (explained, words) = driver.cuGetErrorName(status), driver.cuGetErrorString(status)
    code = code if named else f"{name.decode()} ({int(status)})"
    return code if explained else f"{code}: {words.decode()}"


def runtime_error() -> str | None:
    """What the CUDA runtime that torch uses keeps of a failed call on this thread, which is forgotten with this, unless
    the device itself has failed; None if all went well, or if torch has no runtime of its own library."""
    runtime = _runtime()
    code = 0 if runtime is None else runtime.cudaGetLastError()
    if runtime is None or code == 0:
        return None
    name, words = runtime.cudaGetErrorName(code), runtime.cudaGetErrorString(code)
    return f"{name.decode()} ({code}): {words.decode()}"


@cache
def _runtime() -> Any:
    """The library that torch has loaded. Another copy of it would know nothing of torch's calls."""
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except (OSError, AttributeError):
        return None
    runtime.cudaGetErrorName.restype = runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime
