"""Answers as parts: what a model writes between the pieces of a call's arguments."""

from __future__ import annotations

from thalweg.server.parsers.events import CallArguments, CallBegin, Content, Event, Reasoning
from thalweg.server.parts import Parts

BEGIN = CallBegin(0, "call_0", "f")


def parts_of(*events: Event) -> list[tuple[str, str]]:
    parts = Parts()
    steps = [*parts.feed(events), *parts.end()]
    assert [kind for kind, _, _ in steps].count("begin") == [kind for kind, _, _ in steps].count("end")
    assert all((part.kind == "call") == (part.call is not None) for part in parts.all)
    return [(part.kind, part.text) for part in parts.all]


def test_arguments_stay_whole() -> None:
    events = (BEGIN, Content("I call it."), CallArguments(0, '{"a": '), Reasoning("hm"), CallArguments(0, "1}"))
    assert parts_of(Content("So: "), *events) == [
        ("text", "So: "),
        ("call", '{"a": 1}'),
        ("text", "I call it."),
        ("reasoning", "hm"),
    ]


def test_text_between_calls_stays_there() -> None:
    events = (BEGIN, CallArguments(0, "{}"), Content("and"), CallBegin(1, "call_1", "g"), CallArguments(1, "[]"))
    assert parts_of(*events, Content("done")) == [("call", "{}"), ("text", "and"), ("call", "[]"), ("text", "done")]
