"""From a request's response_format, structured_outputs and tool_choice to the grammar that its output is held to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from thalweg.core import Grammar
from thalweg.errors import InvalidRequest
from thalweg.server.errors import ApiError
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.parsers.lark import json_lark, one_of
from thalweg.server.schemas import GenerationBody
from thalweg.server.tools import ToolUse
from thalweg.tokenizer.messages import plain_data

_KINDS = ("json", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A grammar and the request's field that asks for it."""

    field: str
    grammar: Grammar


def wanted(body: GenerationBody) -> Wanted | None:
    """What the request says its text must be; None where it says nothing. Raises what names the field."""
    said = plain_data(body.structured_outputs, "structured_outputs")  # bounds its depth
    response_format = plain_data(body.response_format, "response_format") or {}
    kind = response_format.get("type", "text")
    if kind == "text":
        return None if said is None else _structured(said)
    if said is not None:
        raise ApiError(
            400, "structured_outputs and response_format are both given; expected one", param="structured_outputs"
        )
    return _response_format(response_format, kind)


def held_to(output: OutputFormat, use: ToolUse, text: Wanted | None, begun: bool) -> Wanted | None:
    """What all of a chat answer must be: tool calls where they are required, `text`, or either where both may be.

    Reasoning may come first; `begun`: the prompt ends within it.
    """
    before = output.reasoning_lark(begun)
    if use.choice != "none" and output.calls is not None:
        calls = output.calls.lark(use.callable_, output.added_tokens, use.parallel)
        if use.choice == "required":
            return _made("tools", "lark", f"start: calls\n{calls}", before)
        if text is not None:
            if text.grammar.kind != "json_schema":
                raise ApiError(
                    400,
                    f"{text.field} is no JSON schema and tools are given; expected one of the two, or tool_choice none",
                    param=text.field,
                )
            answer = json_lark(json.loads(text.grammar.text))
            return _made(text.field, "lark", f"start: calls | answer\nanswer: {answer}\n{calls}", before)
    return None if text is None else _made(text.field, text.grammar.kind, text.grammar.text, before)


def _response_format(value: dict[str, Any], kind: Any) -> Wanted:
    field = "response_format"
    if kind == "json_object":
        return _made(field, "json_schema", '{"type": "object"}')
    if kind != "json_schema":
        reason = f"response_format is of type {str(kind)[:40]!r}; expected text, json_object or json_schema"
        raise ApiError(400, reason, param=field)
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        expected = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        raise ApiError(400, f"response_format has no schema; expected {expected}", param=field)
    return _made(field, "json_schema", json.dumps(schema))


def _structured(value: dict[str, Any]) -> Wanted:
    field = "structured_outputs"
    given = [kind for kind in _KINDS if value.get(kind) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise ApiError(400, f"{field} has {got}; expected one of {', '.join(_KINDS)}", param=field)
    [kind] = given
    what = value[kind]
    if kind == "json" and isinstance(what, dict):
        return _made(field, "json_schema", json.dumps(what))
    if kind == "choice" and isinstance(what, list) and what and all(isinstance(c, str) and c for c in what):
        return _made(field, "lark", f"start: CHOICE\n{one_of('CHOICE', what)}")
    if kind not in ("json", "choice") and isinstance(what, str):
        return _made(field, "regex" if kind == "regex" else "lark", what)
    expected = {"json": "a JSON schema", "choice": "a list of texts, none of them empty"}.get(kind, "a string")
    raise ApiError(400, f"{field}.{kind} is a {type(what).__name__}; expected {expected}", param=field)


def _made(field: str, kind: Any, text: str, before: str = "") -> Wanted:
    try:
        return Wanted(field, Grammar(kind, text, before))
    except InvalidRequest as error:
        raise ApiError(400, str(error), param=field) from None
