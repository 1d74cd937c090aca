"""How the CPU's C++ comes to be: compiled once, refused with a reason, and sound after a fork."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.ops.cpp_case import WRITES, cpp_cache, needs_cpp, program, run  # noqa: F401 -- a fixture
from thalweg import LLM, SamplingParams
from thalweg.errors import ConfigError
from thalweg.ops.linear import LINEAR, LinearDims
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain import cpu_build

THREADED = """
import os, torch
from thalweg.ops.linear import cpp
torch.set_num_threads(3)
x, w = torch.ones(4, 1024), torch.ones(1024, 1024)
assert (cpp.linear(x, w) == 1024).all()
pid = os.fork()
if pid == 0:
    good = all((cpp.linear(x, w) == 1024).all() for _ in range(50))
    os._exit(0 if good else 1)
assert os.waitpid(pid, 0)[1] == 0
assert (cpp.linear(x, w) == 1024).all()
"""
MANY_CALLERS = """
import threading, torch
from thalweg.ops.linear import cpp
torch.set_num_threads(3)
bad = []
def call(n):
    x, w = torch.full((2, 512), float(n)), torch.ones(1024, 512)
    for _ in range(200):
        if not (cpp.linear(x, w) == 512.0 * n).all():
            bad.append(n)
callers = [threading.Thread(target=call, args=(n,)) for n in range(4)]
[c.start() for c in callers]; [c.join() for c in callers]
assert not bad
"""
WITHOUT_THREADS = """
import resource, torch
from thalweg.ops.linear import cpp
x, w = torch.ones(4, 1024), torch.ones(4096, 1024)
torch.set_num_threads(1)
assert (cpp.linear(x, w) == 1024).all()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 20)  # no room for a stack
resource.setrlimit(resource.RLIMIT_AS, (size, size))
torch.set_num_threads(8)
assert (cpp.linear(x, w) == 1024).all()
"""


@needs_cpp
@pytest.mark.parametrize("code", [THREADED, MANY_CALLERS], ids=["fork", "callers"])
def test_threads_are_there(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_cpp
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
def test_work_is_done_if_no_thread_can_be_had() -> None:
    done = run(WITHOUT_THREADS)
    assert done.returncode == 0, done.stderr


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("level", cpu_build.levels(), ids=lambda level: level.name)
def test_every_set_of_instructions_compiles(level: cpu_build.Level) -> None:
    assert cpu_build.built(level).stat().st_size > 0


@needs_cpp
def test_a_built_library_is_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    built = cpu_build.built(cpu_build.level())
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cpu_build.built(cpu_build.level()) == built


def test_a_library_that_came_with_the_package_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = cpu_build.levels()[0]
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu_build, "SHIPPED", tmp_path)
    (tmp_path / f"{level.name}.so").write_bytes(b"library")
    assert cpu_build.built(level) == tmp_path / f"{level.name}.so"


@pytest.mark.parametrize(("features", "level"), [("fp asimd asimddp", "neon_dot"), ("fp asimd", "neon")])
def test_instructions_of_arm_are_found_by_its_features(
    features: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_build.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\nFeatures\t: {features}\n")
    cpu_build.processor_flags.cache_clear()
    try:
        assert cpu_build.level().name == level
    finally:
        cpu_build.processor_flags.cache_clear()


@pytest.mark.parametrize(("error", "level"), [(0, "amx"), (errno.EPERM, "avx512_bf16")])
def test_tiles_are_used_if_the_system_grants_them(
    error: int, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = " ".join(cpu_build.LEVELS["x86_64"][0].flags)
    monkeypatch.setattr(cpu_build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpu_build, "_ask_for_tiles", lambda: error)
    cpu_build.processor_flags.cache_clear()
    try:
        assert cpu_build.level().name == level
        refused = "without AMX: the system refuses its tiles (Operation not permitted)"
        assert (refused in caplog.text) == bool(error)
    finally:
        cpu_build.processor_flags.cache_clear()


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Linux on x86-64")
def test_a_system_asked_for_tiles_answers() -> None:
    has = "amx_tile" in Path("/proc/cpuinfo").read_text()
    error = cpu_build._ask_for_tiles()
    assert error in (errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, *([0] if has else []))


def test_without_a_compiler_the_reference_serves_and_the_reason_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_build._loaded.cache_clear()
    try:
        resolver = Resolver()
        resolver.resolve(LINEAR, Where("cpu", "float32"), LinearDims(D=8, O=8))
        [choice] = resolver.explain()
        assert [span.name for span in choice.table] == ["reference"]
        assert "CXX is 'no-such-compiler', which is not there" in dict(choice.refused)["cpp"]
        assert "whose ops run in plain torch" in caplog.text
        with pytest.raises(ConfigError, match=r"linear.*cannot be served by 'cpp'.*no-such-compiler"):
            Resolver({"linear": "cpp"}).resolve(LINEAR, Where("cpu", "float32"), LinearDims(D=8, O=8))
        with LLM(device="cpu", max_num_seqs=1) as llm:
            assert llm.info.decode_steps == "eager: ops run in torch: CXX is 'no-such-compiler', which is not there"
            [output] = llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))
            assert len(output.outputs[0].token_ids) == 3
    finally:
        cpu_build._loaded.cache_clear()


@needs_cpp
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache: Path) -> None:
    program(cache.parents[1] / "c++", "echo 'few.cpp:1: error: no such thing' >&2; exit 1")
    with pytest.raises(cpu_build.BuildError, match=r"c\+\+ failed: few.cpp:1: error: no such thing"):
        cpu_build.built(cpu_build.level())
    assert [path.name for path in cache.iterdir()] == ["cpu.lock"]


@needs_cpp
def test_a_compiler_that_hangs_is_given_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program(cache.parents[1] / "c++", "exec sleep 20")
    monkeypatch.setattr(cpu_build, "COMPILE_SECONDS", 0.3)
    with caplog.at_level("INFO"), pytest.raises(cpu_build.BuildError, match=r"c\+\+ took longer than 0.3 s"):
        cpu_build.built(cpu_build.level())
    assert "compiling the CPU's ops" in caplog.text
    assert [path.name for path in cache.iterdir()] == ["cpu.lock"]


@needs_cpp
def test_who_waited_for_a_failure_does_not_repeat_it_and_who_comes_later_tries(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, flock = threading.Semaphore(0), fcntl.flock
    calls: list[Future[str] | None] = []

    def build() -> str:
        with pytest.raises(cpu_build.BuildError) as failed:
            cpu_build.built(cpu_build.level())
        return str(failed.value)

    def waiting(*args: Any) -> None:
        waits.release()
        flock(*args)

    def fails(*_: object) -> None:
        assert waits.acquire(timeout=60)  # its own
        calls.append(pool.submit(build) if not calls else None)
        assert len(calls) > 1 or waits.acquire(timeout=60)  # the other's
        time.sleep(0.05)  # a file's time may lag behind by some milliseconds
        raise cpu_build.BuildError(f"failure {len(calls)}")

    monkeypatch.setattr(fcntl, "flock", waiting)
    monkeypatch.setattr(cpu_build, "_compile", fails)
    with ThreadPoolExecutor(1) as pool:
        assert build() == "failure 1"
        [other] = calls
        assert other is not None
        assert other.result(timeout=60) == "failure 1"
        assert build() == "failure 2"


@needs_cpp
def test_a_compiler_is_called_by_the_name_it_was_found_under(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # ccache behind a link named c++, and clang behind clang++, do something else by their own names.
    folder = cache.parents[1]
    program(folder / "launcher", f'[ "${{0##*/}}" = c++ ] || exit 1\n{WRITES}')
    (folder / "c++").unlink()
    (folder / "c++").symlink_to("launcher")
    assert cpu_build.built(cpu_build.level()).read_text() == "library\n"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    assert cpu_build._compiler() == [str(folder / "c++")]


@needs_cpp
def test_a_compiler_may_come_with_a_launcher_and_options(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = os.environ["CXX"]
    launcher = program(cache.parents[1] / "launcher", f'echo "$@" >> {cache.parents[1]}/calls; exec "$@"')
    plain = cpu_build.built(cpu_build.level())
    monkeypatch.setenv("CXX", f"{launcher} {compiler} -DA='b c'")
    assert cpu_build.built(cpu_build.level()) != plain
    calls = (cache.parents[1] / "calls").read_text().splitlines()
    assert calls
    assert all(call.startswith(f"{compiler} -DA=b c -") for call in calls)
    monkeypatch.setenv("CXX", f"{compiler} '")
    with pytest.raises(cpu_build.BuildError, match="which is no command: No closing quotation"):
        cpu_build.built(cpu_build.level())
    monkeypatch.setenv("CXX", program(cache.parents[1] / "my c++", WRITES))
    assert cpu_build.built(cpu_build.level()).exists()


@needs_cpp
def test_sources_use_no_type_that_older_compilers_lack(tmp_path: Path) -> None:
    # GCC 11 and Clang 14 on x86 and GCC 12 on ARM have no _Float16; the system's own headers may name it.
    before = tmp_path / "before.h"
    for source in sorted(cpu_build.OPS.rglob("*.cpp")):
        own = "".join(line for line in source.read_text().splitlines(keepends=True) if line.startswith("#include"))
        before.write_text(f"{own}#pragma GCC poison _Float16\n")
        command = [*cpu_build._compiler(), "-std=c++20", *cpu_build.level().options, f"-I{cpu_build.HEADERS}"]
        command += [f"-I{source.parent}", "-fsyntax-only", "-include", str(before), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_other_devices_and_dtypes_are_refused() -> None:
    assert cpu_build.why_not(Where("cuda", "float32")) == "needs cpu, not cuda"
    assert cpu_build.why_not(Where("cpu", "float16")) == "needs float32 or bfloat16, not float16"
