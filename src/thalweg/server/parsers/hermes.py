"""Tool calls as Hermes and Qwen write them: <tool_call>{"name": NAME, "arguments": {...}}</tool_call>."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.server.parsers.calls import CallParser, NewId
from thalweg.server.parsers.lark import arguments_schema, json_lark, literal, marker_lark
from thalweg.server.parsers.marks import CALL, CALL_END
from thalweg.server.parsers.objects import ObjectWriter, is_text, object_in, read_object, to_json

MARKERS = (CALL, CALL_END)
MAX_HEAD_CHARS = 1024  # within which the arguments begin, for them to be streamed

_SEPARATORS = "[]{},; \t\r\n"
_HEAD = re.compile(r'[\[\]},;\s]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MORE_KEYS = re.compile(r'\s*(,)\s*"')


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
    """Arguments are streamed if a call begins with its name; otherwise, and for what else a block holds, it is read
    at the block's end."""

    def __init__(self, new_id: NewId) -> None:
        super().__init__(new_id)
        self._head: str | None = None  # of a block, while it may begin a call; None outside of blocks
        self._rest: list[str] = []  # of the block, once it is too long for that
        self._called = False  # in this block
        self._behind = False  # directly behind arguments, where the call's object goes on or ends
        self._more: ObjectWriter | None = None  # the rest of that object, which says nothing

    def _text(self, text: str) -> None:
        if self._head is None:
            self._content(text)
            return
        while text:
            if self._writer is not None:
                text = self._write(text)
                self._behind = self._writer is None
            elif self._more is not None:
                _, end = self._more.feed(text)
                text = text[end:]
                if self._more.done:
                    self._more = None
            else:
                text = self._head_text(text)

    def _head_text(self, text: str) -> str:
        assert self._head is not None
        if len(self._head) >= MAX_HEAD_CHARS:
            self._rest.append(text)
            return ""
        size = MAX_HEAD_CHARS - len(self._head)
        self._head += text[:size]
        text = text[size:]
        if self._behind and (more := _MORE_KEYS.match(self._head)):
            self._more = ObjectWriter()
            self._more.feed('{"":0')
            text, self._head, self._behind = self._head[more.start(1) :] + text, "", False
        elif match := _HEAD.match(self._head):
            name = _parsed(match[1])
            if isinstance(name, str) and is_text(name):
                self._begin(name)
                self._writer, self._called, self._behind = ObjectWriter(), True, False
                text, self._head = self._head[match.end() :] + text, ""
        return text

    def _marker(self, marker: str) -> None:
        self._end_block(whole=marker == CALL_END)
        if marker == CALL:
            self._head = ""

    def _close(self) -> None:
        self._end_block(whole=False)

    def _end_block(self, whole: bool) -> None:
        """`whole`: by the marker that ends it; else the last object may have been cut anywhere, even in its name."""
        self._end_arguments()
        text = (self._head or "") + "".join(self._rest)
        seen = 0
        while (start := text.find("{", seen)) >= 0:
            value, end, complete = read_object(text, start)
            call = _call_in(value) if complete or whole else None
            if call is not None:
                self._prose(text[seen:start])
                self._begin(call[0])
                self._arguments(call[1])
                self._called, seen = True, end
            elif self._called:
                self._prose(text[seen:end])
                seen = end
            else:
                break
        self._prose(text[seen:])
        self._head, self._rest, self._more = None, [], None
        self._called = self._behind = False

    def _prose(self, text: str) -> None:
        """What stands beside calls, unless it is what lists and objects are written with."""
        if not self._called or text.strip(_SEPARATORS):
            self._content(text)


def _call_in(value: dict[str, Any]) -> tuple[str, str] | None:
    """Name and arguments of a call that is written as an object, as OpenAI nests them too."""
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    text = object_in(arguments if isinstance(arguments, str) else to_json(arguments))
    return (name, text) if isinstance(name, str) and name and text is not None else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
