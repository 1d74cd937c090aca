"""A checker of JSON against JSON Schema, plain and slow, for the keywords that generators write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_TYPES = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: number(v) and float(v).is_integer(),
    "number": lambda v: number(v),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def valid(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether `value` is an instance of `schema`. Formats are annotations; unevaluated* know allOf and $ref only."""
    root = schema if root is None else root
    return schema if isinstance(schema, bool) else all(_checks(value, schema, root))


def _checks(value: Any, schema: dict[str, Any], root: Any) -> Iterator[bool]:
    def ok(inner: Any, own: Any = value) -> bool:
        return valid(own, inner, root)

    if "$ref" in schema:
        yield ok(_target(schema["$ref"], root))
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        yield any(_TYPES[kind](value) for kind in kinds)
    if "enum" in schema:
        yield any(_equal(value, one) for one in schema["enum"])
    if "const" in schema:
        yield _equal(value, schema["const"])
    yield all(ok(one) for one in schema.get("allOf", ()))
    yield "anyOf" not in schema or any(ok(one) for one in schema["anyOf"])
    yield "oneOf" not in schema or sum(ok(one) for one in schema["oneOf"]) == 1
    yield "not" not in schema or not ok(schema["not"])
    if "if" in schema:
        yield ok(schema.get("then" if ok(schema["if"]) else "else", True))
    if number(value):
        yield from _number_checks(value, schema)
    elif isinstance(value, str):
        yield schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        yield "pattern" not in schema or re.search(schema["pattern"], value, re.ASCII) is not None
    elif isinstance(value, list):
        yield from _array_checks(value, schema, ok)
    elif isinstance(value, dict):
        yield from _object_checks(value, schema, root, ok)


def _number_checks(value: float, schema: dict[str, Any]) -> Iterator[bool]:
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    yield "minimum" not in schema or (value > schema["minimum"] if low is True else value >= schema["minimum"])
    yield "maximum" not in schema or (value < schema["maximum"] if high is True else value <= schema["maximum"])
    yield not number(low) or value > low
    yield not number(high) or value < high
    yield "multipleOf" not in schema or (value / schema["multipleOf"]).is_integer()


def _array_checks(value: list[Any], schema: dict[str, Any], ok: Any) -> Iterator[bool]:
    first, rest = schema.get("prefixItems", []), schema.get("items", True)
    if isinstance(rest, list):
        first, rest = rest, schema.get("additionalItems", True)
    yield all(ok(s, v) for s, v in zip(first, value, strict=False))
    yield all(ok(rest, v) for v in value[len(first) :])
    yield schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
    if schema.get("uniqueItems"):
        yield not any(_equal(a, b) for i, a in enumerate(value) for b in value[:i])
    if "contains" in schema:
        yield sum(ok(schema["contains"], v) for v in value) >= schema.get("minContains", 1)


def _object_checks(value: dict[str, Any], schema: dict[str, Any], root: Any, ok: Any) -> Iterator[bool]:
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    yield all(ok(properties[k], v) for k, v in value.items() if k in properties)
    yield all(ok(s, v) for p, s in patterns.items() for k, v in value.items() if re.search(p, k))
    others = [k for k in value if k not in properties and not any(re.search(p, k) for p in patterns)]
    yield all(ok(schema.get("additionalProperties", True), value[k]) for k in others)
    yield all(k in value for k in schema.get("required", ()))
    yield schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value))
    yield all(ok(schema.get("propertyNames", True), k) for k in value)
    needs = {**schema.get("dependentRequired", {}), **schema.get("dependentSchemas", {})}
    for key, needed in {**needs, **schema.get("dependencies", {})}.items():
        if key in value:
            yield all(k in value for k in needed) if isinstance(needed, list) else ok(needed)
    if "unevaluatedProperties" in schema and "additionalProperties" not in schema:
        left = value.keys() - _evaluated(schema, root)
        yield all(ok(schema["unevaluatedProperties"], value[k]) for k in left)


def _evaluated(schema: dict[str, Any], root: Any) -> set[str]:
    names = set(schema.get("properties", ()))
    for part in schema.get("allOf", ()):
        names |= _evaluated(part, root)
    return names | (_evaluated(_target(schema["$ref"], root), root) if "$ref" in schema else set())


def _target(reference: str, root: Any) -> Any:
    value, fragment = root, reference.partition("#")[2]
    if fragment and not fragment.startswith("/"):
        return next(s for s in root["$defs"].values() if s.get("$anchor") == fragment)
    for key in fragment.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def _equal(a: Any, b: Any) -> bool:
    if number(a) and number(b):
        return bool(a == b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
