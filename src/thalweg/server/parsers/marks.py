"""Markers in a model's output, each as one character that nothing else in the text can be.

Where a tokenizer has a marker as a token of its own, that token alone is the marker, and the same letters spelled out
are text: a user cannot talk the model into a tool call by having it repeat one. Where it has not, the letters are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from thalweg.tokenizer.detokenizer import MARKS

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
KIMI_SECTION, KIMI_SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
CALL_BEGINS = frozenset((CALL, KIMI_SECTION, KIMI_CALL))
CALL_ENDS = frozenset((CALL_END, KIMI_CALL_END, KIMI_SECTION_END))

_MARKERS = (
    *(THINK, THINK_END, CALL, CALL_END),
    *(KIMI_SECTION, KIMI_SECTION_END, KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END),
)
MARK_OF = {marker: chr(code) for marker, code in zip(_MARKERS, MARKS, strict=False)}
_MARKER_OF = {mark: marker for marker, mark in MARK_OF.items()}
_SPLIT = re.compile(f"([{chr(MARKS[0])}-{chr(MARKS[-1])}])")


def marks_by_id(markers: Iterable[str], added_tokens: Mapping[str, int]) -> dict[int, str]:
    """{token id: its mark} of the markers that are tokens."""
    return {added_tokens[marker]: MARK_OF[marker] for marker in markers if marker in added_tokens}


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """Marked text in order, as (text, "") and ("", marker)."""
    for piece in _SPLIT.split(text):
        if piece in _MARKER_OF:
            yield "", _MARKER_OF[piece]
        elif piece:
            yield piece, ""


class Spelled:
    """Exchanges markers spelled out in a text for their marks; holds back what may become one."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)")
        self._longest = max(map(len, self._markers), default=1)
        self._held = ""

    def feed(self, text: str) -> str:
        text = self._pattern.sub(lambda match: MARK_OF[match.group()], self._held + text)
        held = 0
        for length in range(1, min(self._longest, len(text) + 1)):
            if any(marker.startswith(text[-length:]) for marker in self._markers):
                held = length
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held
