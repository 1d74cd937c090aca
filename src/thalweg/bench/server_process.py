"""A server of our own in a process, and what the system says of it: memory, files, children. Linux only."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from thalweg.config.engine import EngineConfig
from thalweg.errors import ThalwegError, UnsupportedError

START_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What a process holds: resident memory in bytes, open files (sockets too), threads."""

    memory: int
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> ProcessUse:
        """Raises OSError when there is no such process any more."""
        status = Path(f"/proc/{pid}/status").read_text()
        memory, threads = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))  # type: ignore[index]
        return cls(memory * 1024, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), threads)


class ServerProcess:
    """`thalweg serve` on a free port of the loopback address."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        [self.engine_pid] = [pid for pid in _children(process.pid) if b"thalweg.engine.processes.main" in _command(pid)]
        address = _command(self.engine_pid).split(b"\0")[-2].decode()
        self.socket_folder = Path(address.removeprefix("ipc://")).parent

    def use(self) -> dict[str, ProcessUse]:
        """Of the HTTP process and the engine process."""
        return {"server": ProcessUse.of(self.process.pid), "engine": ProcessUse.of(self.engine_pid)}

    def leftovers(self) -> list[str]:
        """What should be gone once the process has ended, and is not."""
        left = [f"process {self.engine_pid}"] if b"thalweg.engine.processes.main" in _command(self.engine_pid) else []
        return left + ([str(self.socket_folder)] if self.socket_folder.exists() else [])


@asynccontextmanager
async def serving(config: EngineConfig, log: Path, *options: str) -> AsyncIterator[ServerProcess]:
    """A server that answers; its standard error goes to `log`. Killed at the end if it is still there.

    Raises ThalwegError with the last line of the log when it does not start.
    """
    if not Path("/proc/self/task").exists():
        raise UnsupportedError("this measurement reads /proc, which this system lacks")
    arguments = ["serve", *engine_options(config), "--port", "0", *options]
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "thalweg", *arguments, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"http://\S+(?=/v1)", line)
        if found is None:
            said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise ThalwegError(f"the server did not start: {said[-1]}")
        yield ServerProcess(process, found[0], log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def engine_options(config: EngineConfig) -> list[str]:
    """The command line's arguments that make `config`."""
    default, arguments = EngineConfig(), []
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        if value == getattr(default, name):
            continue
        option = "--" + name.replace("_", "-")
        if name == "model":
            arguments.append(value)
        elif value is False:
            arguments.append("--no-" + name.replace("_", "-"))
        elif name == "op_preference":
            arguments += [part for op, choice in value.items() for part in ("--op", f"{op}={choice}")]
        elif name == "ignore_config_key":
            arguments += [part for key in value for part in (option, key)]
        else:
            arguments += [option] if value is True else [option, str(value)]
    return arguments


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
