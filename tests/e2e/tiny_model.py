"""A small random Kimi-Linear folder with a tokenizer and chat template, and a server process over it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.fixtures.tokenizer_folders import FIRST_SPECIAL, SPECIAL_NAMES, write_kimi
from tests.models import random_checkpoint as random

VOCAB = FIRST_SPECIAL + 256 + 2  # two rows that no token has
CONTEXT = 512
EOS = FIRST_SPECIAL + next(i for i, name in SPECIAL_NAMES.items() if name == "<|im_end|>")

TEMPLATE = (
    "{%- for m in messages -%}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


def write_tiny_model(folder: Path) -> Path:
    """config.json, weights, Kimi tokenizer and template in `folder`."""
    c = random.config(vocab=VOCAB, context=CONTEXT, eos_token_id=EOS)
    random.write(folder, c, random.weights(c))
    write_kimi(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@dataclass(slots=True)
class ServerProcess:
    process: subprocess.Popen[str]
    url: str  # http://127.0.0.1:PORT
    stderr: IO[str]

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        [pid] = [
            int(c) for c in children if b"thalweg.engine.processes.main" in Path(f"/proc/{c}/cmdline").read_bytes()
        ]
        return pid

    def errors(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()


def start_server(log: Path, engine: dict[str, Any], server: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    """A process that calls serve() on a free port, as the command line does; errors go to `log`."""
    options = {"port": 0} | (server or {})
    code = (
        "import sys\n"
        "from thalweg.config.engine import EngineConfig\n"
        "from thalweg.engine.processes.profiler import ProfilerOptions\n"
        "from thalweg.errors import ThalwegError\n"
        "from thalweg.server.run import serve\n"
        "try:\n"
        f"    serve(EngineConfig(**{engine!r}), **{options!r})\n"
        "except ThalwegError as error:\n"
        "    print(f'error: {error}', file=sys.stderr)\n"
        "    sys.exit(2)\n"
    )
    with log.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # so that a test can signal the whole of it, as a terminal does
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


@contextmanager
def command_line_server(log: Path, *arguments: str, code: int, tmp: Path) -> Iterator[ServerProcess]:
    """`thalweg serve` as a user starts it, with `tmp` for temporary files. It must end by itself, or be ended within
    the context, with exit code `code`."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "thalweg", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp)},
        )
    try:
        yield _ready(process, log)
        assert process.wait(20) == code
    finally:
        process.kill()
        process.wait()


def _ready(process: subprocess.Popen[str], log: Path) -> ServerProcess:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+(?=/v1)", line)
    assert found, f"said {line!r}, then {log.read_text()}"
    return ServerProcess(process, found[0], log.open())


@contextmanager
def server_process(log: Path, engine: dict[str, Any], server: dict[str, Any] | None = None) -> Iterator[ServerProcess]:
    """A server that is ready; ended by SIGTERM, which it must obey cleanly."""
    process = start_server(log, engine, server)
    try:
        server = _ready(process, log)
        with server.stderr:
            yield server
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
