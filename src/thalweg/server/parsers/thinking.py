"""Reasoning between <think> and </think>, apart from the answer."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from thalweg.server.parsers.marks import CALL_BEGINS, CALL_ENDS, MARK_OF, THINK, THINK_END, pieces

MARKERS = (THINK, THINK_END)


class Part(Enum):
    REASONING = 1
    CALL_IN_REASONING = 2  # marked text; what of it is not a call is reasoning
    ANSWER = 3  # marked text


class Thinking:
    """Marked text in; its parts out, piece by piece, with white space at the borders of reasoning left out.

    `begun`: the prompt ends within reasoning, as some templates have it. Models call tools within reasoning too, and
    go on with it after the call if no </think> came.
    """

    def __init__(self, begun: bool) -> None:
        self._thinking = self._at_start = begun  # at the start of a stretch, whose leading space is dropped
        self._in_call = False
        self._space: list[str] = []

    @property
    def part(self) -> Part:
        """What a marker that comes now is part of."""
        return Part.CALL_IN_REASONING if self._thinking else Part.ANSWER

    def feed(self, marked: str) -> Iterator[tuple[Part, str]]:
        for text, marker in pieces(marked):
            if marker:
                part = self.part
                self._see(marker)
                yield part, MARK_OF[marker]
                continue
            if self._at_start:
                text = text.lstrip()
                self._at_start = not text
            if self._in_call or not self._thinking:
                yield self.part, text
                continue
            body = text.rstrip()
            if body:
                yield Part.REASONING, "".join(self._space) + body
                self._space = []
            if space := text[len(body) :]:
                self._space.append(space)

    def _see(self, marker: str) -> None:
        if marker in CALL_BEGINS:
            self._in_call, self._at_start = True, False
        elif marker in CALL_ENDS:
            self._in_call = False
        elif marker == THINK_END:
            self._thinking, self._space = False, []
            self._at_start = not self._in_call
        elif marker == THINK and not self._in_call:
            self._thinking = self._at_start = True
