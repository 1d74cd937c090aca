"""Tool calls as Qwen3-Coder and later Qwen models write them.

<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>, with line breaks between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.server.json_schema.document import Document
from thalweg.server.parsers.calls import CallParser, NewId
from thalweg.server.parsers.coerce import coerce, json_types
from thalweg.server.parsers.lark import arguments_schema, json_lark, literal, marker_lark
from thalweg.server.parsers.marks import CALL, CALL_END
from thalweg.server.parsers.objects import to_json

MARKERS = (CALL, CALL_END)
MAX_NAME_CHARS = 256

MAX_TAG_CHARS = MAX_NAME_CHARS + len("<parameter=>")

_PARAMETER_END, _FUNCTION_END = "</parameter>", "</function>"
_NAME = rf"[^<>\s]{{1,{MAX_NAME_CHARS}}}"
_TAG = re.compile(rf"<function=(?P<function>{_NAME})>|<parameter=(?P<parameter>{_NAME})>|</parameter>|</function>")
_BEGUN_TAG = re.compile(rf"<(?:function|parameter)=(?:{_NAME})?")


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
            if own is False:
                continue
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
    """Arguments come one parameter at a time, as JSON of the type that the tool's schema gives the parameter; strings
    come as they are written.

    A value ends where the next tag begins, so that missing ends do no harm. `parameters`: {function: the schema of
    its parameters}.
    """

    def __init__(self, new_id: NewId, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(new_id)
        self._documents = {name: Document(dict(schema)) for name, schema in parameters.items()}
        self._none = Document({})  # of a function that is not a tool
        self._in_block = False
        self._before: list[str] = []  # text since the last tag
        self._buffer = ""  # its end, which may be the beginning of a tag
        self._beside: list[str] = []  # what came in the block before its first call
        self._called = False  # in this block
        self._name: str | None = None  # of the function, until its end
        self._key: str | None = None  # of the parameter whose value is coming
        self._streamed = False  # that value is a string, of which a part was given
        self._at_start = False  # of that string, whose first line break belongs to the tag
        self._keys: set[str] = set()

    def _text(self, text: str) -> None:
        if not self._in_block:
            self._content(text)
            return
        self._buffer += text
        seen = 0
        for tag in _TAG.finditer(self._buffer):
            self._before.append(self._buffer[seen : tag.start()])
            self._tag(tag)
            seen = tag.end()
        cut = self._buffer.rfind("<", max(seen, len(self._buffer) - MAX_TAG_CHARS))
        if cut < 0 or not _may_become_tag(self._buffer[cut:]):
            cut = len(self._buffer)
        self._before.append(self._buffer[seen:cut])
        self._buffer = self._buffer[cut:]
        if self._streamed:
            self._before = [self._more_of_string("".join(self._before))]

    def _tag(self, tag: re.Match[str]) -> None:
        text, self._before = "".join(self._before), []
        in_value = self._key is not None
        self._end_value(text)
        if not in_value:
            self._prose(text)
        if tag["function"]:
            self._end_call()
            prose, self._beside = "".join(self._beside), []
            self._called = True
            self._prose(prose)
            self._name = tag["function"]
            self._begin(self._name)
        elif self._name is None:
            if not self._called:
                self._beside.append(tag[0])
        elif tag["parameter"]:
            self._begin_value(tag["parameter"])
        elif tag[0] == _FUNCTION_END:
            self._end_call()

    def _begin_value(self, key: str) -> None:
        self._key = key
        if key not in self._keys and json_types(*self._schema(key)) == frozenset({"string"}):
            self._begin_argument(key, '"')
            self._streamed = self._at_start = True

    def _more_of_string(self, text: str) -> str:
        """Give more of a streamed string, but for a line break at its end, which may belong to the tag."""
        if self._at_start and text:
            text, self._at_start = text.removeprefix("\n"), False
        kept = text.removesuffix("\n")
        self._arguments(to_json(kept)[1:-1])
        return text[len(kept) :]

    def _end_value(self, text: str) -> None:
        key, self._key = self._key, None
        if self._streamed:
            self._more_of_string(text)
            self._arguments('"')
        elif key is not None and key not in self._keys:
            text = text.removeprefix("\n").removesuffix("\n")
            self._begin_argument(key, to_json(coerce(text, *self._schema(key))))
        self._streamed = False

    def _begin_argument(self, key: str, value: str) -> None:
        comma = ", " if self._keys else "{"
        self._arguments(f"{comma}{to_json(key)}: {value}")
        self._keys.add(key)

    def _schema(self, key: str) -> tuple[Any, Document]:
        """A parameter's own schema, and that of all parameters."""
        document = self._documents.get(self._name or "", self._none)
        properties = document.root.get("properties")
        return properties.get(key) if isinstance(properties, dict) else None, document

    def _end_call(self) -> None:
        if self._name is not None:
            self._arguments("}" if self._keys else "{}")
        self._name, self._key, self._keys = None, None, set()

    def _prose(self, text: str) -> None:
        """What stands in the block beside calls; it is shown as it is if there are none."""
        if not self._called:
            self._beside.append(text)
        elif text.strip():
            self._content(text)

    def _marker(self, marker: str) -> None:
        self._close()
        self._in_block = marker == CALL

    def _in_arguments(self) -> bool:
        return self._key is not None

    def _close(self) -> None:
        rest = self._buffer if self._name is None else ""  # in a call, the beginning of a tag is not text
        text, self._before, self._buffer = "".join(self._before) + rest, [], ""
        if self._key is not None:
            self._end_value(text)
        else:
            self._prose(text)
        self._end_call()
        self._content("".join(self._beside))
        self._beside, self._called, self._in_block = [], False, False


def _may_become_tag(text: str) -> bool:
    ends = ("<function=", "<parameter=", _PARAMETER_END, _FUNCTION_END)
    return any(tag.startswith(text) for tag in ends) or _BEGUN_TAG.fullmatch(text) is not None
