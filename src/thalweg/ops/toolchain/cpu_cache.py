"""Where the CPU's compiled library lies. It is code: a folder or library that another user may write to is not used."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from thalweg.config import env

LOCK = "cpu.lock"
LEFTOVER_SECONDS = 3600
_log = logging.getLogger(__name__)


def place(name: str) -> Path:
    """The path of a library of this name: in the user's cache if it is there or can be put there, otherwise in a folder
    of this process that goes with it. Raises OSError."""
    folder = _shared_folder()
    if folder is not None and (is_sound(folder / name) or os.access(folder, os.W_OK)):
        return folder / name
    return _private_folder(os.getpid()) / name


def is_sound(path: Path) -> bool:
    """Whether it is there and nobody but this user and root can have written it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def put(library: Path, target: Path) -> None:
    """Move a new library to its place. Whoever finds it there finds all of it, after a crash too. Raises OSError."""
    library.chmod(0o755)  # whatever the umask: others may use it, and not change it
    with library.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(library, target)


@contextmanager
def alone(target: Path) -> Iterator[str | None]:
    """One process at a time: ranks and test runs that start together would all compile the same. Gives what another one
    told of this library while this one waited for it."""
    asked = time.time()
    with (target.parent / LOCK).open("a+") as lock:
        # Some network file systems have no locks. Those who compile at once put the same there, each in one piece.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process, however it ends
        for leftover in target.parent.glob("build-*"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(leftover)
        lock.seek(0)
        name, _, reason = lock.read().partition("\n")
        yield reason if name == target.name and os.fstat(lock.fileno()).st_mtime > asked else None


def tell_others(target: Path, reason: str) -> None:
    """Those who wait for this library why they will not get it either."""
    (target.parent / LOCK).write_text(f"{target.name}\n{reason}")


def _shared_folder() -> Path | None:
    base = env.read("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "thalweg"
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # it cannot be made, or nobody knows this user's home
        return None
    if is_sound(folder):
        return folder
    _log.warning("the CPU's ops are compiled for this process alone: others may write to %s", folder)
    return None


@cache
def _private_folder(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="thalweg-"))

    def remove() -> None:
        if os.getpid() == process:  # a forked child has its own
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
