"""From one choice's marked text to events: reasoning, content, tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from thalweg.server.parsers.calls import CallParser
from thalweg.server.parsers.events import CallArguments, CallBegin, Content, Event, Reasoning
from thalweg.server.parsers.marks import Spelled, pieces
from thalweg.server.parsers.thinking import Part, Thinking
from thalweg.tokenizer.stops import StopStrings


class Reader:
    """Text of any size in, events out; adjacent ones of a kind come as one. It is a `text.output.TextReader`.

    `marks`: {token id: its mark}; `spelled`: markers that are not tokens. `stop` strings end the output when they
    occur in the content; reasoning and calls are not searched. Where calls are looked for,
    white space before a call belongs to it, and so does white space at the end of an answer with calls.
    """

    def __init__(
        self,
        thinking: Thinking | None = None,
        calls: CallParser | None = None,
        marks: Mapping[int, str] | None = None,
        spelled: Iterable[str] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self.marks: Mapping[int, str] = marks or {}
        self._thinking, self._calls = thinking, calls
        markers = tuple(spelled)
        self._spelled = Spelled(markers) if markers else None
        self._stops = StopStrings(stop, include_stop)
        self._space: list[str] = []  # content if more content follows, or if there are no calls
        self._called = False
        self._events: list[Event] = []

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the output."""
        return self._stops.matched

    def feed(self, text: str, *, last: bool = False) -> list[Event]:
        """`last`: nothing more comes, so that what was held back comes too."""
        if self.matched_stop is not None:
            return []
        if self._spelled is not None:
            text = self._spelled.feed(text) + (self._spelled.end() if last else "")
        for part, piece in [(Part.ANSWER, text)] if self._thinking is None else self._thinking.feed(text):
            if part is Part.REASONING:
                self._take([Reasoning(piece)])
            elif self._calls is not None:
                self._take(self._calls.feed(piece), part)
            else:
                self._take([Content(text) for text, _ in pieces(piece) if text])
        if last and self._calls is not None:
            self._take(self._calls.end(), Part.ANSWER if self._thinking is None else self._thinking.part)
        if last:
            self._content(self._stops.end())
        if (last or self.matched_stop is not None) and self._space and not self._called:
            self._events.append(Content("".join(self._space)))
        events, self._events = self._events, []
        return _merged(events)

    def _take(self, events: Iterable[Event], part: Part = Part.ANSWER) -> None:
        for event in events:
            if self.matched_stop is not None:
                return
            if isinstance(event, Content) and part is Part.ANSWER:
                self._content(self._stops.feed(event.text))
                continue
            self._content(self._stops.end())  # what is not content comes between, and no stop string spans that
            if isinstance(event, CallBegin):
                self._space, self._called = [], True
            self._events.append(Reasoning(event.text) if isinstance(event, Content) else event)

    def _content(self, text: str) -> None:
        body = text if self._calls is None else text.rstrip()
        if body:
            self._events.append(Content("".join(self._space) + body))
            self._space = []
        if space := text[len(body) :]:
            self._space.append(space)


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
