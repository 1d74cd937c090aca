"""Pieces of grammars, in llguidance's variant of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.core import JSON_WHITESPACE
from thalweg.server import json_schema

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Where these are said, `properties` are not all there are.
_MORE_PROPERTIES = frozenset(("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties"))


def literal(text: str) -> str:
    """Exactly `text`."""
    return json.dumps(text, ensure_ascii=False)


def one_of(name: str, texts: Sequence[str]) -> str:
    """A rule: one of `texts`, none of them empty. It is a terminal, which costs no more for thousands of them."""
    return f"{name}: {' | '.join(map(literal, texts))}"


def marker_lark(marker: str, added_tokens: Mapping[str, int]) -> str:
    """A marker: its token, where it is one."""
    return f"<[{added_tokens[marker]}]>" if marker in added_tokens else literal(marker)


def json_lark(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """JSON of a schema. `lenient`: what the schema says beyond what is known is passed over."""
    options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def arguments_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool's arguments must be: an object of the parameters that it names, unless its schema says more. What of
    the schema cannot be compiled is dropped."""
    parameters = tool["function"].get("parameters")
    if not parameters:
        return _NO_PARAMETERS
    closed = {} if _MORE_PROPERTIES & parameters.keys() else {"additionalProperties": False}
    return json_schema.lenient({"type": "object", **closed, **parameters})
