"""What parsers of tool calls have in common: the text around calls, and where a JSON object ends."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable

from thalweg.server.parsers.events import CallArguments, CallBegin, Content, Event
from thalweg.server.parsers.marks import THINK, THINK_END, pieces

NewId = Callable[[], str]


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class CallParser(ABC):
    """Marked text in, in pieces of any size; content and tool calls out. The same whatever the pieces are.

    It never raises: what does not parse is content. Markers never are.
    `new_id` names calls in formats whose calls have no id of their own.
    """

    def __init__(self, new_id: NewId) -> None:
        self._new_id = new_id
        self._events: list[Event] = []
        self._num_calls = 0

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

    @abstractmethod
    def _in_arguments(self) -> bool:
        """Whether arguments have begun and not ended: there a mark of reasoning is left out, and ends no call."""

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

    def _taken(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken


class ObjectScanner:
    """Finds the end of a JSON object in a text that comes in pieces. It looks at brackets and strings alone."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.done = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object, which begins with the first one fed."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.done = True
                    return i + 1
        return len(text)
