"""Tool calls as Qwen3-Coder and later Qwen models write them.

<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>, with line breaks between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.server.parsers.calls import CallParser, NewId
from thalweg.server.parsers.lark import arguments_schema, json_lark, literal, marker_lark
from thalweg.server.parsers.marks import CALL, CALL_END

MARKERS = (CALL, CALL_END)
MAX_NAME_CHARS = 256

_FUNCTION = re.compile(r"\s*<function=([^<>\s]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\s]+)>")
_PARAMETER_END, _FUNCTION_END = "</parameter>", "</function>"


def lark(tools: Sequence[Mapping[str, Any]], added_tokens: Mapping[str, int], parallel: bool) -> str:
    """Rules of a grammar: `calls` as CallFormat has it. Strings are free, other values by their schema."""
    begin, end = (marker_lark(m, added_tokens) for m in MARKERS)
    names = " | ".join(f"call{i}" for i in range(len(tools)))
    more = ' ("\\n" call)*' if parallel else ""
    rules = [f"calls: call{more}", f'call: {begin} "\\n" ({names}) {end}']
    for i, tool in enumerate(tools):
        schema = arguments_schema(tool)
        required = schema.get("required") or []
        shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parameters = []
        for j, (key, own) in enumerate(schema.get("properties", {}).items()):
            parameters.append(f"value{i}_{j}" + ("" if key in required else "?"))
            head = literal(f"<parameter={key}>\n")
            if isinstance(own, dict) and own and own.get("type") != "string":
                rules.append(f"json{i}_{j}: {json_lark({**shared, **own}, lenient=True)}")
                value = f'json{i}_{j} "\\n</parameter>\\n"'
            else:
                value = "free_text"
            rules.append(f"value{i}_{j}: {head} {value}")
        head = literal(f"<function={tool['function']['name']}>\n")
        rules.append(f'call{i}: {head} {" ".join(parameters)} "</function>\\n"')
    return "\n".join([*rules, r'free_text[suffix="\n</parameter>\n"]: /(.|\n)*/'])


class Qwen3Coder(CallParser):
    """Arguments come one parameter at a time, as JSON of the type that the tool's schema gives the parameter.

    `types`: {function: {parameter: its schema's "type"}}.
    """

    def __init__(self, new_id: NewId, types: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(new_id)
        self._types = types
        self._buffer: str | None = None  # what came of a call and was not used yet; None outside of calls
        self._name: str | None = None  # of the function, once it is known
        self._key: str | None = None  # of the parameter whose value is coming
        self._keys: set[str] = set()
        self._searched = 0  # in the buffer there is no end of the value before here

    def _text(self, text: str) -> None:
        if self._buffer is None:
            self._content(text)
            return
        self._buffer += text
        while self._step():
            pass

    def _step(self) -> bool:
        """Use up the next part of the buffer; False when it is not whole yet."""
        assert self._buffer is not None
        if self._name is None:
            match = _FUNCTION.match(self._buffer[:MAX_NAME_CHARS])
            if match is not None:
                self._name = match[1]
                self._begin(self._name)
        elif self._key is not None:
            end = self._buffer.find(_PARAMETER_END, self._searched)
            if end < 0:
                self._searched = max(0, len(self._buffer) - len(_PARAMETER_END))
                return False
            self._parameter(self._name, self._key, self._buffer[:end])
            self._buffer, self._key = self._buffer[end + len(_PARAMETER_END) :], None
            return True
        elif self._buffer.lstrip().startswith(_FUNCTION_END):
            rest = self._buffer.lstrip().removeprefix(_FUNCTION_END)
            self._finish()
            self._content(rest)
            return False
        else:
            match = _PARAMETER.match(self._buffer[:MAX_NAME_CHARS])
            if match is not None:
                self._key, self._searched = match[1], 0
        if match is None:
            return False
        self._buffer = self._buffer[match.end() :]
        return True

    def _parameter(self, function: str, key: str, text: str) -> None:
        text = text.removeprefix("\n").removesuffix("\n")
        kind = self._types.get(function, {}).get(key)
        value = text if kind == "string" else _value(text)
        if key not in self._keys:
            comma = ", " if self._keys else "{"
            self._arguments(f"{comma}{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
            self._keys.add(key)

    def _marker(self, marker: str) -> None:
        if marker == CALL_END and self._name is not None and self._key is None and not (self._buffer or "").strip():
            self._finish()  # the function's own end is missing and nothing else
        self._close()
        if marker == CALL:
            self._buffer = ""

    def _finish(self) -> None:
        self._arguments("}" if self._keys else "{}")
        self._buffer, self._name, self._key, self._keys = None, None, None, set()

    def _in_arguments(self) -> bool:
        return self._key is not None

    def _close(self) -> None:
        if self._buffer is not None and self._key is None:
            self._content(self._buffer)
        self._buffer, self._name, self._key, self._keys = None, None, None, set()


def _value(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value)
    except (ValueError, RecursionError):
        return text
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)  # NaN and Infinity are no JSON
