"""From one choice's marked text to events: reasoning, content, tool calls."""

from __future__ import annotations

from collections.abc import Iterable

from thalweg.server.parsers.calls import CallParser
from thalweg.server.parsers.events import CallArguments, Content, Event, Reasoning
from thalweg.server.parsers.marks import Spelled, pieces
from thalweg.server.parsers.thinking import Thinking


class Reader:
    """Text of any size in, events out; adjacent ones of a kind come as one. `spelled`: markers that are no tokens."""

    def __init__(
        self, thinking: Thinking | None = None, calls: CallParser | None = None, spelled: Iterable[str] = ()
    ) -> None:
        self._thinking, self._calls = thinking, calls
        markers = tuple(spelled)
        self._spelled = Spelled(markers) if markers else None

    def feed(self, text: str, *, last: bool = False) -> list[Event]:
        """`last`: nothing more comes, so that what was held back comes too."""
        if self._spelled is not None:
            text = self._spelled.feed(text) + (self._spelled.end() if last else "")
        events: list[Event] = []
        for reasoning, rest in [("", text)] if self._thinking is None else self._thinking.feed(text):
            if reasoning:
                events.append(Reasoning(reasoning))
            if rest:
                events += self._answer(rest)
        if last and self._calls is not None:
            events += self._calls.end()
        return _merged(events)

    def _answer(self, marked: str) -> list[Event]:
        if self._calls is not None:
            return self._calls.feed(marked)
        return [Content(text) for text, _ in pieces(marked) if text]


def _merged(events: list[Event]) -> list[Event]:
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            merged[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            merged[-1] = CallArguments(last.index, last.text + event.text)
        else:
            merged.append(event)
    return merged
