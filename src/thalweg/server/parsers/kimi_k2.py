"""Kimi K2's tool calls, marked by tokens: section, call, `functions.NAME:INDEX`, arguments, ends of both.

The format is described in the model's own guide to tool calls (Kimi K2, docs/tool_call_guidance.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.server.parsers.calls import CallParser, NewId
from thalweg.server.parsers.lark import arguments_schema, json_lark, literal, marker_lark
from thalweg.server.parsers.marks import (
    KIMI_ARGUMENTS,
    KIMI_CALL,
    KIMI_CALL_END,
    KIMI_SECTION,
    KIMI_SECTION_END,
)
from thalweg.server.parsers.objects import ObjectWriter, object_in

MARKERS = (KIMI_SECTION, KIMI_SECTION_END, KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END)
MAX_NAME_CHARS = 256

_ID = re.compile(r"(?P<prefix>functions\.)?(?P<name>[A-Za-z0-9_.-]+?)\s*(?::\s*(?P<index>[0-9]{1,9}))?")


def lark(tools: Sequence[Mapping[str, Any]], added_tokens: Mapping[str, int], parallel: bool) -> str:
    """Rules of a grammar: `calls` of these tools, as CallFormat has it."""
    section, section_end, call, arguments, call_end = (marker_lark(m, added_tokens) for m in MARKERS)
    names = " | ".join(f"call{i}" for i in range(len(tools)))
    rules = [f"calls: {section} call{'+' if parallel else ''} {section_end}", f"call: {call} ({names}) {call_end}"]
    for i, tool in enumerate(tools):
        head = literal(f"functions.{tool['function']['name']}:")
        rules.append(f"call{i}: {head} CALL_INDEX {arguments} arguments{i}")
        rules.append(f"arguments{i}: {json_lark(arguments_schema(tool), lenient=True)}")
    return "\n".join([*rules, "CALL_INDEX: /[0-9]{1,3}/"])


class KimiK2(CallParser):
    """Ids come out as `functions.NAME:INDEX`, which the model's template expects back, with an index of their own.

    Whatever is missing of the markers: text within a section, or after the beginning of a call, is an id.
    """

    def __init__(self, new_id: NewId) -> None:
        super().__init__(new_id)
        self._ids: set[str] = set()
        self._in_section = False
        self._id: str | None = None  # what came of an id; None where none is expected
        self._match: re.Match[str] | None = None  # the id of a call whose arguments are expected
        self._strange: list[str] = []  # what came instead of an object
        self._in_tail = False  # behind the arguments, where brackets may be left over

    def _text(self, text: str) -> None:
        if self._id is not None:
            self._id_text(text)
            return
        if self._match is not None:
            if not self._strange:
                text = text.lstrip()
            if self._strange or text[:1] not in ("", "{"):
                self._strange.append(text)
                return
            if not text:
                return
            self._open(self._match)
        in_arguments = self._writer is not None
        text = self._write(text)
        self._in_tail |= in_arguments and self._writer is None
        if self._in_tail:
            text = text.lstrip("}], \t\r\n")
            self._in_tail = not text
        self._content(text)

    def _id_text(self, text: str) -> None:
        assert self._id is not None
        self._id += text
        brace = self._id.find("{")
        if brace < 0 and len(self._id) <= MAX_NAME_CHARS:
            return
        seen, self._id = self._id, None
        match = _matched(seen[:brace]) if brace >= 0 else None
        if match is None:
            self._content(seen)
        else:  # the marker of the arguments is missing
            self._match = match
            self._text(seen[brace:])

    def _marker(self, marker: str) -> None:
        if marker == KIMI_ARGUMENTS and self._id is not None and (match := _matched(self._id)) is not None:
            self._match, self._id = match, None
            return
        if self._id is not None and (match := _matched(self._id)) is not None and (match["prefix"] or match["index"]):
            self._match, self._id = match, None  # a whole id without arguments
        self._close()
        if marker == KIMI_SECTION:
            self._in_section = True
        elif marker == KIMI_SECTION_END:
            self._in_section = False
        if marker == KIMI_CALL or self._in_section:
            self._id = ""

    def _open(self, match: re.Match[str]) -> None:
        # A model may give two calls one id, and whoever answers them could not tell them apart.
        index = self._num_calls if match["index"] is None else int(match["index"])
        while (call_id := f"functions.{match['name']}:{index}") in self._ids:
            index += 1
        self._ids.add(call_id)
        self._begin(match["name"], call_id)
        self._match, self._writer = None, ObjectWriter()

    def _close(self) -> None:
        self._end_arguments()
        self._in_tail = False
        seen, self._id = self._id, None
        self._content(seen or "")
        strange, self._strange = "".join(self._strange), []
        if self._match is not None:
            arguments = object_in(strange)
            if arguments is None:
                self._content(self._match[0] + strange)
                self._match = None
            else:
                self._open(self._match)
                self._write(arguments)
                self._end_arguments()


def _matched(text: str) -> re.Match[str] | None:
    text = text.strip()
    return _ID.fullmatch(text) if len(text) <= MAX_NAME_CHARS else None
