"""Reasoning between <think> and </think>, apart from the answer."""

from __future__ import annotations

from collections.abc import Iterator

from thalweg.server.parsers.marks import MARK_OF, THINK, THINK_END, pieces

MARKERS = (THINK, THINK_END)


class Thinking:
    """Marked text in; (reasoning, rest) out, piece by piece, white space at their borders left out.

    `begun`: the prompt ends within reasoning, as some templates have it. A tool call ends reasoning too.
    """

    def __init__(self, begun: bool) -> None:
        self._thinking = self._at_start = begun  # at the start of a stretch, whose leading space is dropped
        self._space = ""

    def feed(self, marked: str) -> Iterator[tuple[str, str]]:
        for text, marker in pieces(marked):
            if marker == THINK:
                self._thinking = self._at_start = True
            elif marker == THINK_END:
                self._at_start, self._thinking, self._space = True, False, ""
            elif marker:
                self._thinking, self._at_start, self._space = False, False, ""
                yield "", MARK_OF[marker]
            else:
                if self._at_start:
                    text = text.lstrip()
                    self._at_start = not text
                if not self._thinking:
                    yield "", text
                    continue
                body = text.rstrip()
                if body:
                    yield self._space + body, ""
                    self._space = ""
                self._space += text[len(body) :]
