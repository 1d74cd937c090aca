"""Values of arguments that a model writes as text, by what the tool's schema says of them."""

from __future__ import annotations

import json
import re
from typing import Any

from thalweg.server.json_schema.document import Document
from thalweg.server.parsers.objects import read_object

_MAX_DEPTH = 8  # of references and alternatives in a schema
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}
_NOTHING = object()


def coerce(text: str, schema: Any, document: Document) -> Any:
    """The value that `text` stands for under `schema`, a part of `document`; the text itself if it is no other value.

    A string stays a string if the schema allows nothing else, whatever it looks like. Python's spelling of constants
    and lists will do if the schema wants them; what the schema says nothing about is JSON, or text.
    """
    types = json_types(schema, document)
    if types == frozenset({"string"}):
        return text
    value = _json(text)
    if types is None:
        return text if value is _NOTHING else value
    for candidate in (value, *_lenient(text.strip(), types)):
        if isinstance(candidate, float) and "number" not in types and candidate.is_integer():
            candidate = int(candidate)
        if _type(candidate) in types or (_type(candidate) == "integer" and "number" in types):
            return candidate
    if isinstance(value, str) and "string" not in types and value != text:
        return coerce(value, schema, document)  # a number in quotes
    return text if "string" in types or value is _NOTHING else value


def json_types(schema: Any, document: Document, depth: int = 0) -> frozenset[str] | None:
    """The types that `schema` allows; None if it does not say."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return None
    said: list[frozenset[str] | None] = []
    kind = schema.get("type")
    if isinstance(kind, str | list):
        names = [kind] if isinstance(kind, str) else [name for name in kind if isinstance(name, str)]
        said.append(frozenset(names + ["null"] * (schema.get("nullable") is True)))
    elif "const" in schema:
        said.append(frozenset((_type(schema["const"]),)))
    elif isinstance(schema.get("enum"), list):
        said.append(frozenset(map(_type, schema["enum"])))
    if (target := document.target(schema)) is not None:
        said.append(json_types(document.at(target), document, depth + 1))
    for keyword in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(keyword), list):
            each = [json_types(option, document, depth + 1) for option in options]
            said.append(None if None in each else frozenset().union(*filter(None, each)))
    if isinstance(parts := schema.get("allOf"), list):
        said += [json_types(part, document, depth + 1) for part in parts]
    known = [types for types in said if types]
    return frozenset.intersection(*known) or None if known else None


def _json(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return _NOTHING
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)  # NaN and Infinity are no JSON


def _lenient(text: str, types: frozenset[str]) -> list[Any]:
    """What a text that is not of JSON may stand for."""
    if text.lower() in _CONSTANTS:
        return [_CONSTANTS[text.lower()]]
    if text.startswith(("{", "[")) and types & {"object", "array"}:
        return [read_object('{"":' + text + "}")[0].get("")]
    return [int(text)] if re.fullmatch(r"[+-]?[0-9]{1,300}", text) else []


def _type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "")
