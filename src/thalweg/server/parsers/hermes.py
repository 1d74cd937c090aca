"""Tool calls as Hermes and Qwen write them: <tool_call>{"name": NAME, "arguments": {...}}</tool_call>."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.server.parsers.calls import CallParser, NewId, ObjectScanner
from thalweg.server.parsers.lark import arguments_schema, json_lark, literal, marker_lark
from thalweg.server.parsers.marks import CALL, CALL_END

MARKERS = (CALL, CALL_END)
MAX_HEAD_CHARS = 1024  # within which the arguments begin, for them to be streamed

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def lark(tools: Sequence[Mapping[str, Any]], added_tokens: Mapping[str, int], parallel: bool) -> str:
    """Rules of a grammar: `calls` of these tools, as CallFormat has it."""
    begin, end = (marker_lark(m, added_tokens) for m in MARKERS)
    names = " | ".join(f"call{i}" for i in range(len(tools)))
    more = ' ("\\n" call)*' if parallel else ""
    rules = [f"calls: call{more}", f'call: {begin} "\\n" ({names}) "}}\\n" {end}']
    for i, tool in enumerate(tools):
        head = literal(f'{{"name": {json.dumps(tool["function"]["name"])}, "arguments": ')
        rules.append(f"call{i}: {head} arguments{i}")
        rules.append(f"arguments{i}: {json_lark(arguments_schema(tool), lenient=True)}")
    return "\n".join(rules)


class Hermes(CallParser):
    def __init__(self, new_id: NewId) -> None:
        super().__init__(new_id)
        self._call: str | None = None  # what came of a call whose arguments are not being streamed
        self._scanner: ObjectScanner | None = None  # of arguments being streamed
        self._in_tail = False  # between the arguments and the end of the call

    def _text(self, text: str) -> None:
        if self._call is not None:
            self._call += text
            match = _HEAD.match(self._call[:MAX_HEAD_CHARS])
            name = None if match is None else _parsed(match[1])
            if match is None or not isinstance(name, str):
                return
            text, self._call = self._call[match.end() :], None
            self._begin(name)
            self._scanner = ObjectScanner()
        if self._scanner is not None:
            end = self._scanner.feed(text)
            self._arguments(text[:end])
            text = text[end:]
            if self._scanner.done:
                self._scanner, self._in_tail = None, True
        if self._in_tail:
            text = text.lstrip()
            if text.startswith("}"):
                text, self._in_tail = text[1:], False
            elif text:
                self._in_tail = False
        self._content(text)

    def _marker(self, marker: str) -> None:
        self._close()
        if marker == CALL:
            self._call = ""

    def _in_arguments(self) -> bool:
        return self._scanner is not None

    def _close(self) -> None:
        call, self._call, self._scanner, self._in_tail = self._call, None, None, False
        if call is None:
            return
        value = _parsed(call)
        name = value.get("name") if isinstance(value, dict) else None
        arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if isinstance(name, str) and name and isinstance(arguments, dict):
            self._begin(name)
            self._arguments(json.dumps(arguments, ensure_ascii=False))
        else:
            self._content(call)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
