"""From the fields of a request that say what its text must be, and its tools, to the grammar it is held to."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from thalweg.core import MAX_GRAMMAR_CHARS, Grammar
from thalweg.errors import InvalidRequest
from thalweg.server import dialects, json_schema
from thalweg.server.errors import ApiError, shown
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.parsers.lark import json_lark, one_of
from thalweg.server.schemas import GenerationBody, Grammars
from thalweg.server.tools import ToolUse
from thalweg.tokenizer.messages import plain_data

_KINDS = ("json", "regex", "choice", "grammar")
_KIND_OF = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A grammar and the request's field that asks for it."""

    field: str
    grammar: Grammar


async def wanted(body: GenerationBody) -> Wanted | None:
    """What the request says its text must be; None if it says nothing. Raises what names the field."""
    asked = [(name, value) for name in Grammars.model_fields if not _says_nothing(name, value := getattr(body, name))]
    # A schema may be long to go through, and the first one loads a library.
    return await asyncio.to_thread(_wanted, asked) if asked else None


def _wanted(asked: list[tuple[str, Any]]) -> Wanted:
    if len(asked) > 1:
        first, second = asked[0][0], asked[1][0]
        raise ApiError(400, f"{second} and {first} are both given; expected one of them", param=second)
    [(field, value)] = asked
    value = plain_data(value, field)  # bounds its depth
    if field == "response_format":
        return _response_format(value)
    if field == "structured_outputs":
        return _structured(value)
    return _of_kind(field, field, _KIND_OF[field], value)


def _says_nothing(field: str, value: Any) -> bool:
    if field == "response_format":
        return value is None or value.get("type", "text") == "text"
    return value is None or value == ""


async def held_to(
    output: OutputFormat, use: ToolUse, text: Wanted | None, begun: bool, thinks: bool = True
) -> Wanted | None:
    """What all of a chat answer must be: tool calls where they are required, `text`, or either where both may be.

    Reasoning may come first if the request does not forbid it (`thinks`); `begun`: the prompt ends within it.
    """
    if text is None and use.choice != "required":
        return None
    before = output.reasoning_lark(begun) if begun or thinks else ""
    return await asyncio.to_thread(_held_to, output, use, text, before)


def _held_to(output: OutputFormat, use: ToolUse, text: Wanted | None, before: str) -> Wanted | None:
    if use.choice != "none" and output.calls is not None:
        calls = output.calls.lark(use.callable_, output.added_tokens, use.parallel)
        if use.choice == "required":
            return _made("tools", "lark", f"start: calls\n{calls}", before)
        if text is not None:
            if text.grammar.kind != "json_schema":
                raise ApiError(
                    400,
                    f"{text.field} is not a JSON schema and tools are given; expected one of them, or tool_choice none",
                    param=text.field,
                )
            answer = json_lark(json.loads(text.grammar.text))
            return _made(text.field, "lark", f"start: calls | answer\nanswer: {answer}\n{calls}", before)
    return None if text is None else _made(text.field, text.grammar.kind, text.grammar.text, before)


def _response_format(value: dict[str, Any]) -> Wanted:
    """OpenAI's form, llama.cpp's (a schema beside the type) and TGI's (a value beside the type)."""
    field, kind = "response_format", value["type"]
    inner, own = value.get("json_schema"), value.get("value")
    if kind in ("json_object", "json") and (schema := value.get("schema", own)) is not None:
        return _of_kind(field, f"{field}.{'value' if 'schema' not in value else 'schema'}", "json", schema)
    if kind == "json_object":
        return _of_kind(field, field, "json", {"type": "object"})
    if kind == "json_schema":
        for holder, where in ((inner, f"{field}.json_schema"), (value, field), (own, f"{field}.value")):
            if isinstance(holder, dict) and holder.get("schema") is not None:
                return _of_kind(field, f"{where}.schema", "json", holder["schema"])
        expected = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        raise ApiError(400, f"{field} has no schema; expected {expected}", param=field)
    if kind in ("regex", "grammar"):
        where = kind if own is None else "value"
        return _of_kind(field, f"{field}.{where}", kind, value.get(where))
    reason = f"{field} is of type {shown(kind)}; expected text, json_object, json_schema, regex or grammar"
    raise ApiError(400, reason, param=field)


def _structured(value: dict[str, Any]) -> Wanted:
    field = "structured_outputs"
    for name in value.keys() - {*_KINDS, "json_object", "_backend", "disable_fallback"}:
        if not dialects.neutral(value[name]):
            raise ApiError(400, f"{field} has {name[:40]!r}; expected one of {', '.join(_KINDS)}", param=field)
    given = [kind for kind in (*_KINDS, "json_object") if value.get(kind) not in (None, False)]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise ApiError(400, f"{field} has {got}; expected one of {', '.join(_KINDS)}", param=field)
    if given == ["json_object"]:
        return _of_kind(field, field, "json", {"type": "object"})
    return _of_kind(field, f"{field}.{given[0]}", given[0], value[given[0]])


def _of_kind(field: str, where: str, kind: str, what: Any) -> Wanted:
    """A grammar of _KINDS; `where` in the request's `field` it stands."""
    if kind == "json" and isinstance(what, str):
        what = _parsed(field, where, what)
    if kind == "json" and isinstance(what, dict):
        try:
            return _made(field, "json_schema", json.dumps(json_schema.strict(what, where)))
        except json_schema.RefusedError as error:
            raise ApiError(400, str(error), param=field, code="invalid_grammar") from None
    if kind == "choice" and isinstance(what, list) and what and all(isinstance(c, str) and c for c in what):
        return _made(field, "lark", f"start: CHOICE\n{one_of('CHOICE', what)}")
    if kind not in ("json", "choice") and isinstance(what, str):
        return _made(field, "regex" if kind == "regex" else "lark", what)
    expected = {"json": "a JSON schema", "choice": "a list of texts, none of them empty"}.get(kind, "a string")
    raise ApiError(400, f"{where} is a {type(what).__name__}; expected {expected}", param=field)


def _parsed(field: str, where: str, text: str) -> Any:
    """A schema that came as text."""
    try:
        return plain_data(json.loads(text[: MAX_GRAMMAR_CHARS + 1]), field)
    except (ValueError, RecursionError):
        reason = f"{where} is not JSON, or has more than {MAX_GRAMMAR_CHARS} characters of it; expected a JSON schema"
        raise ApiError(400, reason, param=field) from None


def _made(field: str, kind: Any, text: str, before: str = "") -> Wanted:
    try:
        return Wanted(field, Grammar(kind, text, before))
    except InvalidRequest as error:
        raise ApiError(400, str(error), param=field) from None
