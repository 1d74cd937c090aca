"""What parsers of tool calls have in common."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable

from thalweg.server.parsers.events import CallArguments, CallBegin, Content, Event
from thalweg.server.parsers.marks import THINK, THINK_END, pieces
from thalweg.server.parsers.objects import ObjectWriter

NewId = Callable[[], str]


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class CallParser(ABC):
    """Marked text in, in pieces of any size; content and tool calls out. The same whatever the pieces are.

    It never raises: what cannot be read as a call is content; markers never are. A call's arguments are an object of
    JSON, whatever the model wrote and wherever the output ended.
    `new_id` names calls in formats whose calls have no id of their own.
    """

    def __init__(self, new_id: NewId) -> None:
        self._new_id = new_id
        self._events: list[Event] = []
        self._num_calls = 0
        self._writer: ObjectWriter | None = None  # of arguments that are coming

    def feed(self, marked: str) -> list[Event]:
        for text, marker in pieces(marked):
            if not marker:
                self._text(text)
            elif marker not in (THINK, THINK_END):
                self._marker(marker)
            elif not self._in_arguments():
                self._close()
        return self._taken()

    def end(self) -> list[Event]:
        """What was held back, once nothing more comes."""
        self._close()
        return self._taken()

    @abstractmethod
    def _text(self, text: str) -> None: ...

    @abstractmethod
    def _marker(self, marker: str) -> None: ...

    def _in_arguments(self) -> bool:
        """Whether arguments have begun and not ended: there a mark of reasoning is left out, and ends no call."""
        return self._writer is not None

    @abstractmethod
    def _close(self) -> None:
        """The output ends, wherever it is."""

    def _content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def _begin(self, name: str, call_id: str | None = None) -> None:
        self._events.append(CallBegin(self._num_calls, call_id or self._new_id(), name))
        self._num_calls += 1

    def _arguments(self, text: str) -> None:
        """More arguments of the call begun last."""
        if text:
            self._events.append(CallArguments(self._num_calls - 1, text))

    def _write(self, text: str) -> str:
        """Text of the arguments that are coming, the first of which begins with "{"; what stands behind them."""
        if self._writer is None:
            return text
        out, end = self._writer.feed(text)
        self._arguments(out)
        if self._writer.done:
            self._writer = None
        return text[end:]

    def _end_arguments(self) -> None:
        if self._writer is not None:
            self._arguments(self._writer.end())
            self._writer = None

    def _taken(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken
