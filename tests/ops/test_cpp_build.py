"""How the CPU's C++ comes to be: compiled once, kept where nobody else can change it, refused with a reason, and sound
after a fork."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.cpp_case import needs_cpp
from thalweg.errors import ConfigError
from thalweg.ops.linear import LINEAR, LinearDims
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain import cpu_build, cpu_cache

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
BUILT = """
from thalweg.ops.toolchain import cpu_build
print(cpu_build.built(cpu_build.level()).stat().st_size)
"""
WRITES = 'for out; do :; done; echo library > "$out"'  # a compiler's last argument


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


@needs_cpp
def test_a_library_that_is_there_serves_from_a_folder_that_cannot_be_written_to(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu_build.built(cpu_build.level())
    monkeypatch.setattr(os, "access", lambda _, mode, **__: mode != os.W_OK)
    assert cpu_build.built(cpu_build.level()) == library


@needs_cpp
@pytest.mark.parametrize("what", ["folder", "library"])
@pytest.mark.parametrize("how", ["mode", "owner"])
def test_what_others_may_have_written_is_not_loaded(
    what: str, how: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu_build.built(cpu_build.level())
    library.write_text("planted")
    path = cache if what == "folder" else library
    if how == "mode":
        path.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(path, 54321, 54321)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
    found = cpu_build.built(cpu_build.level())
    assert found.read_text() == "library\n"
    assert cpu_cache.is_sound(found) == (how == "mode" or os.geteuid() == 0)
    assert (found.parent == cache) == (what == "library")


@needs_cpp
def test_whatever_the_umask_others_may_not_write(cache: Path) -> None:
    before = os.umask(0)
    try:
        library = cpu_build.built(cpu_build.level())
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache, library)] == [0o755, 0o755]


@needs_cpp
def test_a_user_without_a_home_and_a_file_in_the_folders_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    cache.parent.mkdir()
    cache.write_text("")
    places = [cpu_build.built(cpu_build.level())]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    places.append(cpu_build.built(cpu_build.level()))
    assert places[0] == places[1]
    assert places[0].parent.name.startswith("thalweg-")


@needs_cpp
def test_a_folder_of_one_process_goes_with_it(cache: Path) -> None:
    folder = cache.parent
    folder.mkdir()
    done = run(BUILT, TMPDIR=str(folder), XDG_CACHE_HOME="/dev/null")
    assert done.stdout == "8\n", done.stderr
    assert list(folder.iterdir()) == []


@needs_cpp
def test_a_library_is_on_the_disk_before_it_has_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for name in ("fsync", "replace"):
        actual = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, call=actual: (done.append(n), call(*args))[1])
    cpu_build.built(cpu_build.level())
    assert done == ["fsync", "replace"]


@needs_cpp
def test_a_file_system_without_locks_and_folders_left_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    (cache / "build-old").mkdir(parents=True)
    (cache / "build-new").mkdir()
    cache.chmod(0o755)
    os.utime(cache / "build-old", (0, 0))
    monkeypatch.setattr(fcntl, "flock", flock)
    library = cpu_build.built(cpu_build.level())
    assert {path.name for path in cache.iterdir()} == {"build-new", "cpu.lock", library.name}


def test_other_devices_and_dtypes_are_refused() -> None:
    assert cpu_build.why_not(Where("cuda", "float32")) == "needs cpu, not cuda"
    assert cpu_build.why_not(Where("cpu", "float16")) == "needs float32 or bfloat16, not float16"
