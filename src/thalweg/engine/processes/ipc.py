"""A private folder for sockets between processes, which goes with them however they end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import BinaryIO

MAX_FOLDER_LENGTH = 80  # a socket's path may have 107 characters in all
PREFIX = "thalweg-ipc-"
_LOCK = "lock"
_UNLOCKED_SECONDS = 60.0  # before a folder without its lock counts as given up, and not as being made
_LEAVE = b"."  # on standard input, before its end: the parent lives and clears up


class SocketFolder:
    """A new folder that only this user can enter, with a path short enough for the sockets in it.

    The process that makes it removes it (`cleanup`). If that process dies first, its children do (`end_with_parent`);
    if they die with it, the next process that makes a folder does: the folder's lock, which the system lets go with
    the process that holds it, tells whether anybody is left.
    """

    def __init__(self) -> None:
        remove_stale()
        folder = tempfile.TemporaryDirectory(prefix=PREFIX)
        if len(folder.name) > MAX_FOLDER_LENGTH:  # TMPDIR lies deep
            folder.cleanup()
            remove_stale(Path("/tmp"))
            folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir="/tmp")
        self._folder, self.path = folder, Path(folder.name)
        self._lock = _hold(self.path)

    def cleanup(self) -> None:
        self._folder.cleanup()
        self._lock.close()


def remove_stale(parent: Path | None = None) -> None:
    """Remove the folders in `parent` (the usual place for temporary files) whose processes are all gone.

    Only this user's own are looked at, and links are not followed.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            if _is_stale(folder):
                remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder of sockets; others may be removing it at the same time."""
    shutil.rmtree(folder, ignore_errors=True)


def _hold(folder: Path) -> BinaryIO:
    """The folder's lock, held: it has its name only from then on, so that nobody finds it free meanwhile."""
    unnamed = folder / f"{_LOCK}.new"
    lock = unnamed.open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    unnamed.rename(folder / _LOCK)
    return lock


def _is_stale(folder: Path) -> bool:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - status.st_mtime > _UNLOCKED_SECONDS
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def address(folder: Path, name: str) -> str:
    """Of a socket in a folder."""
    return f"ipc://{folder}/{name}"


def tell_to_leave(process: subprocess.Popen[bytes]) -> None:
    """Have a child that is still there leave at once, whatever it is doing (`end_with_parent`)."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        if not process.stdin.closed:
            process.stdin.write(_LEAVE)
            process.stdin.close()


def end_group(child: int) -> None:
    """Kill whatever is left of a child that was started with a session of its own: it, its ranks and compilers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def end_with_parent(own_address: str) -> None:
    """Leave at once when standard input ends, which the parent holds open: no orphan keeps memory or a device. What
    this process runs, such as ranks and compilers, goes with it, though it hangs, if its session is its own.

    Unless the parent said `tell_to_leave`, it died, and the folder of `own_address`, a socket, is removed first.

    SIGTERM does nothing: who stops a service may send it to all of its processes, and requests are then under way.
    """

    def wait() -> None:
        told = b""
        with contextlib.suppress(OSError):
            while read := os.read(0, 4096):
                told = read
        if not told.endswith(_LEAVE):
            remove(Path(own_address.removeprefix("ipc://")).parent)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=wait, name="thalweg-parent-watch", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: None)  # a handler, which what this process runs does not inherit
