"""Requests wait for their grammar outside of the engine's steps."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from thalweg.core import Grammar, Request, SamplingParams, SchedulerStats
from thalweg.engine import gate as gate_module
from thalweg.engine.gate import GrammarGate
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.main import GATE_POLL_MS, IDLE_POLL_MS, STATS_INTERVAL_S, EngineProcess
from thalweg.errors import InvalidRequest, QueueTimeout


class Compiling:
    def __init__(self) -> None:
        self.futures: dict[Grammar, Future[Any]] = {}

    def compiled(self, grammar: Grammar) -> Future[Any]:
        return self.futures.setdefault(grammar, Future())


def request(name: str, pattern: str | None) -> Request:
    grammar = None if pattern is None else Grammar("regex", pattern)
    return Request(id=name, prompt_token_ids=[1], params=SamplingParams(grammar=grammar))


def test_requests_pass_once_their_grammar_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, added, refused = Compiling(), [], []
    gate = GrammarGate(grammars, lambda r: added.append(r.id), lambda i, e: refused.append((i, type(e), str(e))))  # type: ignore[arg-type]
    for name, pattern in (("a", "x"), ("free", None), ("b", "y"), ("c", "x"), ("d", "z"), ("e", "w")):
        gate.take(request(name, pattern))
    gate.poll()
    assert added == ["free"]
    assert gate.waiting
    gate.abort("c")
    grammars.futures[Grammar("regex", "x")].set_result(None)
    grammars.futures[Grammar("regex", "y")].set_exception(InvalidRequest("the grammar cannot be used: no"))
    grammars.futures[Grammar("regex", "w")].set_exception(RuntimeError("two\nlines"))
    gate.poll()
    assert added == ["free", "a"]
    gate.take(request("f", "x"))
    assert added == ["free", "a", "f"]
    assert refused == [
        ("b", InvalidRequest, "the grammar cannot be used: no"),
        ("e", InvalidRequest, "the grammar cannot be used: RuntimeError"),
    ]
    gate.take(request("g", "v"))
    grammars.futures[Grammar("regex", "z")].set_running_or_notify_cancel()
    monkeypatch.setattr(gate_module.time, "monotonic", lambda: 1e12)
    gate.poll()
    assert refused[2:] == [
        ("d", InvalidRequest, "the grammar takes more than 10 seconds to compile"),
        ("g", QueueTimeout, "the grammar waited for 10 seconds while others were compiled; try later"),
    ]
    assert not gate.waiting


def test_an_idle_engine_does_not_sleep_over_a_grammar_and_says_that_it_lives() -> None:
    grammars, polls, sent = Compiling(), [], []
    inbox: list[m.ToEngine | None] = [m.Add([request("a", "x")]), *[None] * 3, m.Stop()]  # None: nothing there yet

    def poll(timeout_ms: int) -> bool:
        polls.append(timeout_ms)
        if inbox[0] is None:
            inbox.pop(0)
            time.sleep(STATS_INTERVAL_S / 2)
            return False
        return True

    socket = SimpleNamespace(poll=poll, recv=lambda: m.encode(inbox.pop(0)), send=sent.append)
    core = SimpleNamespace(has_work=lambda: False, check=lambda: None, stats=lambda: SchedulerStats(*[0] * 9))
    EngineProcess(socket, SimpleNamespace(core=core, grammars=grammars, lock_step=None)).run()  # type: ignore[arg-type]
    assert polls == [IDLE_POLL_MS, *[GATE_POLL_MS] * 4]
    assert isinstance(m.decode_from_engine(sent[0]), m.Updates)
