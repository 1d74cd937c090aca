"""Kimi K2's tool calls, marked by tokens: section, call, `functions.NAME:INDEX`, arguments, ends of both.

The format is described in the model's own guide to tool calls (Kimi K2, docs/tool_call_guidance.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.server.parsers.calls import CallParser, NewId, ObjectScanner
from thalweg.server.parsers.lark import arguments_schema, json_lark, literal, marker_lark
from thalweg.server.parsers.marks import (
    KIMI_ARGUMENTS,
    KIMI_CALL,
    KIMI_CALL_END,
    KIMI_SECTION,
    KIMI_SECTION_END,
)

MARKERS = (KIMI_SECTION, KIMI_SECTION_END, KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END)
MAX_NAME_CHARS = 256

_ID = re.compile(r"(?:functions\.)?(?P<name>[A-Za-z0-9_.-]+?)(?::\d+)?")


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
    def __init__(self, new_id: NewId) -> None:
        super().__init__(new_id)
        self._ids: set[str] = set()
        self._in_id = False  # between the beginning of a call and that of its arguments
        self._id = ""
        self._pending: tuple[str, str] | None = None  # name and id of a call whose arguments have not begun
        self._scanner: ObjectScanner | None = None  # of the arguments

    def _text(self, text: str) -> None:
        if self._in_id:
            self._id += text
            return
        if self._pending is not None:
            text = text.lstrip()
            if not text:
                return
            name, call_id = self._pending
            self._pending = None
            if text[0] == "{":
                self._call(name, call_id)
                self._scanner = ObjectScanner()
            else:
                self._content(call_id)  # no arguments, so no call
        if self._scanner is not None and not self._scanner.done:
            end = self._scanner.feed(text)
            self._arguments(text[:end])
            text = text[end:]
        self._content(text)

    def _marker(self, marker: str) -> None:
        if marker == KIMI_ARGUMENTS and self._in_id:
            self._in_id = False
            call_id = self._id.strip()
            match = _ID.fullmatch(call_id) if len(call_id) <= MAX_NAME_CHARS else None
            if match is None:
                self._content(self._id)
            else:
                self._pending = match["name"], call_id
            return
        if marker == KIMI_CALL_END and self._pending is not None:
            name, call_id = self._pending
            self._call(name, call_id)  # a function without parameters
            self._arguments("{}")
            self._pending = None
        self._close()
        if marker == KIMI_CALL:
            self._in_id, self._id = True, ""

    def _call(self, name: str, call_id: str) -> None:
        # A model may give two calls one id, and whoever answers them could not tell them apart.
        self._begin(name, None if call_id in self._ids else call_id)
        self._ids.add(call_id)

    def _in_arguments(self) -> bool:
        return self._scanner is not None and not self._scanner.done

    def _close(self) -> None:
        if self._in_id:
            self._content(self._id)
        if self._pending is not None:
            self._content(self._pending[1])
        self._in_id, self._pending, self._scanner = False, None, None
