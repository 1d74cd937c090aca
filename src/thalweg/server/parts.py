"""An answer as parts in order (reasoning, text, calls), for APIs whose answers and streams are made of such."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from thalweg.server.parsers.events import CallBegin, Content, Event, Reasoning


@dataclass(slots=True)
class Part:
    """`index` counts the answer's parts from 0. Of a call the pieces are its arguments."""

    index: int
    kind: Literal["reasoning", "text", "call"]
    call: CallBegin | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


Step = tuple[Literal["begin", "more", "end"], Part, str]  # what came, of which part, and the text of "more"


class Parts:
    """Takes a sequence's events; each part ends before the next one begins. What a model writes between the pieces of
    a call's arguments comes after the call: arguments are whole."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._open: Part | None = None
        self._held: list[Event] = []

    def feed(self, events: Iterable[Event]) -> Iterator[Step]:
        for event in events:
            if isinstance(event, CallBegin):
                yield from self.end()
                yield from self._begin("call", event)
                continue
            if self._open is not None and self._open.kind == "call" and isinstance(event, Content | Reasoning):
                self._held.append(event)
                continue
            kind: Literal["reasoning", "text", "call"] = (
                "text" if isinstance(event, Content) else "reasoning" if isinstance(event, Reasoning) else "call"
            )
            if self._open is None or self._open.kind != kind:
                yield from self._begin(kind)
            assert self._open is not None
            self._open.pieces.append(event.text)
            yield "more", self._open, event.text

    def end(self) -> Iterator[Step]:
        """The end of the last part, and what was held back behind it, once nothing more comes."""
        yield from self._end()
        held, self._held = self._held, []
        if held:
            yield from self.feed(held)
            yield from self._end()

    def _end(self) -> Iterator[Step]:
        if (part := self._open) is not None:
            self._open = None
            yield "end", part, ""

    def _begin(self, kind: Literal["reasoning", "text", "call"], call: CallBegin | None = None) -> Iterator[Step]:
        yield from self._end()
        self._open = Part(len(self.all), kind, call)
        self.all.append(self._open)
        yield "begin", self._open, ""
