"""C++ for the CPU: all sources of the ops as one library, compiled at first use by the machine's compiler.

The library is plain C: ctypes calls it with addresses and sizes. It knows nothing of Python or torch, so it is compiled
in a few seconds and is the same for all of their versions. It lies in a cache folder under a name made of sources,
options and compiler; one that finds no compiler, or whose compiler fails, leaves the ops to their references, and
`why_not` says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch.autograd import profiler

from thalweg.config import env
from thalweg.ops.registry import Refusal, Where
from thalweg.ops.toolchain import cpu_cache

OPS = Path(__file__).parents[1]
HEADERS = Path(__file__).with_name("cpu")
SHIPPED = HEADERS / "built"  # in a wheel for one platform (scripts/platform_wheel.py): a library for each level
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as the sources number them
OPTIONS = ("-std=c++20", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-pthread")
COMPILE_SECONDS = 300  # others wait for as long
Tell = Callable[[str, Sequence[Any], tuple[Any, ...]], None]
_told: dict[int, Tell] = {}  # by thread
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Level:
    """A set of instructions: the processor's flags that it needs, as Linux names them, and the compiler's options."""

    name: str
    flags: frozenset[str]
    options: tuple[str, ...]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_TILES = frozenset({"amx_tile", "amx_bf16"})
_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_BF16 = Level("avx512_bf16", _AVX512 | {"avx512_vnni", "avx512_bf16"}, (*_WIDE, "-mavx512vnni", "-mavx512bf16"))
LEVELS = {
    "x86_64": (
        Level("amx", _BF16.flags | _TILES, (*_BF16.options, "-mamx-tile", "-mamx-bf16")),
        _BF16,
        Level("avx512_vnni", _AVX512 | {"avx512_vnni"}, (*_WIDE, "-mavx512vnni")),
        Level("avx512", _AVX512, _WIDE),
        Level("avx2_vnni", _AVX2 | {"avx_vnni"}, ("-march=x86-64-v3", "-mavxvnni")),
        Level("avx2", _AVX2, ("-march=x86-64-v3",)),
    ),
    "aarch64": (
        Level("neon_dot", frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod",)),
        Level("neon", frozenset(), ()),
    ),
}
LEVELS["arm64"] = LEVELS["aarch64"]  # as macOS names it
"""By machine, the widest first."""


class BuildError(Exception):
    """The library cannot be had; one line says why."""


def why_not(where: Where, dims: object = None) -> Refusal:
    """Why C++ for the CPU cannot serve there, or None. The first call in a process loads the library, and the first on
    a machine compiles it."""
    if where.device != "cpu":
        return f"needs cpu, not {where.device}"
    if where.dtype not in ("float32", "bfloat16"):
        return f"needs float32 or bfloat16, not {where.dtype}"
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def function(name: str, *types: Any) -> Callable[..., int]:
    """The library's function `thalweg_<name>`, which takes arguments of these ctypes types and lets other Python
    threads run; its result means something unless the function is void. The profiler shows calls as `thalweg::<name>`,
    beside torch's own ops, but for those that are recorded. Raises BuildError."""
    loaded = _loaded()
    if isinstance(loaded, str):
        raise BuildError(loaded)
    found: Any = loaded[f"thalweg_{name}"]
    found.argtypes = types
    seen = f"thalweg::{name}"

    def call(*args: Any) -> Any:
        if _told and (tell := _told.get(get_ident())) is not None:
            tell(name, types, args)
        elif profiler._is_profiler_enabled:
            with profiler.record_function(seen):
                return found(*args)
        return found(*args)

    return call


def address(name: str) -> int:
    """Of the library's function `thalweg_<name>`. Raises BuildError if it has none."""
    loaded = _loaded()
    if isinstance(loaded, str):
        raise BuildError(loaded)
    try:
        return ctypes.cast(loaded[f"thalweg_{name}"], ctypes.c_void_p).value or 0
    except AttributeError:
        raise BuildError(f"the CPU's library has no function {name}") from None


@contextmanager
def telling(tell: Tell) -> Iterator[None]:
    """Inside, each call that this thread makes of a `function` is told first: its name, types and arguments."""
    _told[get_ident()] = tell
    try:
        yield
    finally:
        del _told[get_ident()]


def levels() -> tuple[Level, ...]:
    """Those of this kind of machine, the widest first."""
    return LEVELS.get(platform.machine().lower(), ())


def level() -> Level:
    """The widest instructions of this processor. Raises BuildError if there are none for it."""
    for found in levels():
        if found.flags <= processor_flags():
            return found
    known = " or ".join(found.name for found in levels())
    raise BuildError(f"needs a processor with {known}" if known else f"has no code for {platform.machine()}")


@cache
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return ctypes.CDLL(str(built(level())))
    except (BuildError, OSError) as e:
        _log.warning("no C++ on this CPU, whose ops run in plain torch: %s", e)
        return str(e)


def built(level: Level) -> Path:
    """The library for such a processor, compiled unless it came with the package or is in the cache. Raises BuildError
    or OSError."""
    shipped = SHIPPED / f"{level.name}.so"
    if shipped.is_file():
        return shipped
    compiler = _compiler()
    program = os.path.realpath(compiler[0])
    sources = _sources()
    key = hashlib.sha256(repr((level.options, OPTIONS, compiler, program, os.stat(program).st_mtime_ns)).encode())
    for path in (*sorted(HEADERS.glob("*.h")), *sources):
        key.update(path.read_bytes())
    target = cpu_cache.place(f"cpu-{level.name}-{key.hexdigest()[:24]}.so")
    if not cpu_cache.is_sound(target):
        _log.info("compiling the CPU's ops for %s with %s, or waiting for a process that does", level.name, compiler[0])
        with cpu_cache.alone(target) as failed:
            if failed:
                raise BuildError(failed)
            if not cpu_cache.is_sound(target):
                began = time.monotonic()
                with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
                    library = Path(scratch, target.name)
                    try:
                        _compile(compiler, level, sources, library)
                    except BuildError as e:
                        cpu_cache.tell_others(target, str(e))
                        raise
                    cpu_cache.put(library, target)
                _log.info("compiled the CPU's ops for %s in %.1f s", level.name, time.monotonic() - began)
    return target


def compile_for(level: Level, library: Path) -> None:
    """Write the library for a level. Raises BuildError."""
    _compile(_compiler(), level, _sources(), library)


def _sources() -> list[Path]:
    return sorted(OPS.rglob("*.cpp"))


def _compile(compiler: Sequence[str], level: Level, sources: Sequence[Path], library: Path) -> None:
    deadline = time.monotonic() + COMPILE_SECONDS
    options = [*OPTIONS, *level.options, f"-I{HEADERS}"]
    objects = [library.with_name(f"{i}.o") for i in range(len(sources))]
    commands = [
        [*compiler, *options, "-c", str(source), "-o", str(out)] for source, out in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda command: _call(command, deadline), commands))
    _call([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)], deadline)


def _call(command: Sequence[str], deadline: float) -> None:
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline - time.monotonic()
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} took longer than {COMPILE_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{name} failed: {lines[0][:300]}")


def _compiler() -> list[str]:
    """The command, by the name it was found under: ccache and clang++ are links to programs that do other things by
    their own names."""
    asked = env.read("CXX")
    try:
        choices = [[asked], shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    except ValueError as e:
        raise BuildError(f"CXX is {asked!r}, which is no command: {e}") from None
    for name, *options in filter(None, choices):
        found = shutil.which(name)
        if found is not None:
            return [os.path.abspath(found), *options]
    raise BuildError(f"CXX is {asked!r}, which is not there" if asked else "needs a C++ compiler (c++, g++ or clang++)")


@cache
def processor_flags() -> frozenset[str]:
    """As Linux names them, without those of tiles (AMX) if it does not let this process use them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), ())
    flags = frozenset(found)
    if flags >= _TILES and (error := _ask_for_tiles()):
        _log.warning("the CPU's ops do without AMX: the system refuses its tiles (%s)", os.strerror(error))
        flags -= _TILES
    return flags


def _ask_for_tiles() -> int:
    """0, or the system's error. A process has to ask before its first tile: arch_prctl(ARCH_REQ_XCOMP_PERM,
    XFEATURE_XTILEDATA) holds for all of its threads and is inherited by forks."""
    request = map(ctypes.c_long, (158, 0x1023, 18))
    return ctypes.get_errno() if ctypes.CDLL(None, use_errno=True).syscall(*request) else 0
