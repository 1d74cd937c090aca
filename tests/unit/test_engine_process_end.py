"""What an engine's process does at its end."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from thalweg.engine.processes import main as process
from thalweg.engine.processes import messages as m
from thalweg.errors import ThalwegError


@pytest.mark.parametrize("fails", [False, True])
def test_only_an_engine_that_did_not_fail_writes_its_cache_down(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Process:
        def __init__(self, *_: Any) -> None: ...

        def run(self) -> None:
            if fails:
                raise ThalwegError("its books are wrong: a test")

        def close(self) -> None: ...

    engine = SimpleNamespace(info=None, close=lambda save: closed.append(save))
    monkeypatch.setattr(process, "Engine", lambda *_: engine)
    monkeypatch.setattr(process, "EngineConfig", lambda **_: None)
    monkeypatch.setattr(process, "EngineProcess", Process)
    monkeypatch.setattr(process, "end_with_parent", lambda _: None)
    context = zmq.Context()
    own = SimpleNamespace(socket=context.socket, term=lambda: None)
    monkeypatch.setattr(process.zmq.Context, "instance", staticmethod(lambda: own))
    monkeypatch.setattr(process.m, "Ready", lambda info: m.Dead("ready", ""))
    address = f"ipc://{tmp_path}/socket"

    def front() -> None:
        with context.socket(zmq.PAIR) as socket:
            socket.connect(address)
            socket.send(m.encode(m.Start({})))
            socket.recv()

    thread = threading.Thread(target=front)
    thread.start()
    assert process.main(address) == (2 if fails else 0)
    thread.join()
    context.destroy()
    assert closed == [not fails]
