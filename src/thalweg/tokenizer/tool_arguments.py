"""The arguments of tool calls in a conversation's earlier turns, as templates expect them: an object, or its JSON."""

from __future__ import annotations

import json
from typing import Any

from thalweg.errors import InvalidRequest
from thalweg.tokenizer.messages import plain_data


class Arguments(dict[str, Any]):
    """An object that is its own JSON text wherever a template wants text.

    Clients send arguments as JSON text. Most templates want the object (`arguments | items`, `| tojson`,
    `arguments is mapping`), and other engines parse it for them all; others join it to texts
    (`name + arguments`), print it, or use a method of texts. Which of these a template does cannot be told from
    its source with certainty, because arguments pass through variables, macros and filters on the way, and one
    template may do both; so the value itself answers to both. To `is string` and `is mapping` it is an object.

    One kind of template gets the text as it came, as with transformers: one that asks for a string and otherwise
    writes JSON (template_forms.prints_arguments). What the model reads then is what it wrote itself, to the space.
    """

    __slots__ = ("_json",)

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self._json = text

    def __str__(self) -> str:
        return self._json

    def __add__(self, other: Any) -> str:
        return self._json + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return other + self._json if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: Any) -> Any:
        return self._json[key] if isinstance(key, slice) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name in self or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._json, name)


def with_arguments(turn: dict[str, Any], keep_text: bool) -> dict[str, Any]:
    """A message whose tool calls have Arguments, from an object or its JSON text; none at all are an empty object.

    With keep_text a text stays one. So does a text that is no JSON object, the model's own slip perhaps.
    """
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    return turn | {"tool_calls": [_with_arguments(call, keep_text) for call in calls]}


def _with_arguments(call: Any, keep_text: bool) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = call["function"]
    return call | {"function": function | {"arguments": _arguments(function.get("arguments"), keep_text)}}


def _arguments(given: Any, keep_text: bool) -> Any:
    if given is None or (isinstance(given, str) and not given.strip()):
        given = "{}"
    text = given
    if isinstance(given, str):
        if keep_text:
            return given
        try:
            given = plain_data(json.loads(given), "arguments")
        except (ValueError, RecursionError, InvalidRequest):
            return text
    elif isinstance(given, dict):
        text = json.dumps(given, ensure_ascii=False)
    return Arguments(given, text) if isinstance(given, dict) else text
