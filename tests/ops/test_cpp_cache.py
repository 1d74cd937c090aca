"""Where the CPU's compiled library lies: nobody else can change it, and it is whole."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tests.ops.cpp_case import cpp_cache, needs_cpp, run  # noqa: F401 -- a fixture
from thalweg.ops.toolchain import cpu_build, cpu_cache

BUILT = """
from thalweg.ops.toolchain import cpu_build
print(cpu_build.built(cpu_build.level()).stat().st_size)
"""


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
