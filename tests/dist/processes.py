"""A server of several ranks as its processes: found and watched by /proc, from the start on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from thalweg.engine.processes.ipc import PREFIX

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by /proc")
SHARED_MEMORY = Path("/dev/shm")


def until(condition: Callable[[], object], what: str, seconds: float = 60, every: float = 0.002) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(every)


def lives(pid: int) -> bool:
    """False for a zombie, too: an orphan that ended and that nobody reaped yet."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Of all threads, as any of them may have started one."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += map(int, (thread / "children").read_text().split())
        except OSError:
            continue
    return found


def maps(pid: int, name: str) -> bool:
    """Whether a file of this name is in the process's memory."""
    try:
        return f"/{name}\n" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def stop(pid: int) -> None:
    """Let a process do nothing more, and come back when it does not."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: all(") T" in (t / "stat").read_text() for t in Path(f"/proc/{pid}/task").iterdir()), "it goes on")


def _is_engine(pid: int) -> bool:
    return "processes.main" in command(pid)


class Server:
    """`thalweg serve` and the processes that it starts."""

    def __init__(self, process: subprocess.Popen[str], log: Path, tmp: Path) -> None:
        self.process, self.log, self._tmp = process, log, tmp
        self._seen: set[int] = {process.pid}

    def pid(self, who: str) -> int | None:
        """Of "server", "engine" or "rank 1", or, of data-parallel ranks, "engine 1"; None until it is there."""
        if who == "server":
            return self.process.pid
        engines = {command(c).strip().rpartition("/")[2]: c for c in children(self.process.pid) if _is_engine(c)}
        engine = engines.get(who.replace(" ", "-") if who.startswith("engine") else "engine")
        if engine is None or who.startswith("engine"):
            found = engine
        else:
            socket = who.replace(" ", "-")
            ranks = (c for c in children(engine) if "rank_main" in command(c))
            found = next((c for c in ranks if command(c).strip().endswith(socket)), None)
        if found is not None:
            self._seen.add(found)
        return found

    def all_of(self, ranks: int, of: str = "rank") -> dict[str, int]:
        """Every process, once all are there; `of`: what those beside the first engine are."""
        names = ["server", "engine", *(f"{of} {n}" for n in range(1, ranks))]
        until(lambda: all(self.pid(name) for name in names), "a process is missing")
        return {name: self.pid(name) or 0 for name in names}

    def url(self) -> str:
        """Once requests are served."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        assert found, f"said {line!r}, then {self.log.read_text()}"
        return found[0]

    def socket_folder(self) -> Path | None:
        return next(self._tmp.glob(PREFIX + "*"), None)

    def check_gone(self, within: float) -> int:
        """Every process that was seen ends, and what they had on disk and in shared memory goes: the exit code."""
        began = time.monotonic()
        code = self.process.wait(within)
        until(lambda: not any(map(lives, self._seen)), "a process lives on", within - (time.monotonic() - began))
        until(lambda: not left_in(self._tmp), f"{left_in(self._tmp)} stays", 1)
        return code


def left_in(tmp: Path) -> list[str]:
    return [path.name for path in tmp.iterdir()]


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def left_in_shared_memory(before: set[str]) -> set[str]:
    """What is new there since `before` and no process has in its memory: other tests may run beside this one."""
    held = set[str]()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            held |= {line.rpartition("/")[2] for line in maps.read_text().splitlines() if f"{SHARED_MEMORY}/" in line}
        except OSError:  # it ended, or is another user's
            continue
    return shared_memory() - before - held


@contextmanager
def serving(log: Path, tmp: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    """`thalweg serve` as a user starts it, with `tmp` for temporary files; perhaps not yet ready."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp)} | variables
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "thalweg", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
    server = Server(process, log, tmp)
    try:
        yield server
    finally:
        for pid in server._seen:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
