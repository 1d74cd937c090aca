"""A schema's document: what its references lead to, and whether two of its schemas can have an instance in common."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_REFERENCES = ("$ref", "$recursiveRef", "$dynamicRef")
MAX_HOPS = 32  # of references that lead to references


class Document:
    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self._names: dict[str, tuple[str, ...]] | None = None

    def target(self, schema: dict[str, Any]) -> tuple[str, ...] | None:
        """Where the reference of `schema` leads, as keys from the root on; None if it is not within the document."""
        reference = reference_of(schema)
        if not isinstance(reference, str):
            return None
        base, _, fragment = reference.partition("#")
        start: tuple[str, ...] | None = ()
        if base and base != self.root.get("$id", self.root.get("id")):
            start = self._named(base)
        if start is not None and fragment and not fragment.startswith("/"):
            start = self._named("#" + unquote(fragment))
        if start is None:
            return None
        keys = [unquote(k).replace("~1", "/").replace("~0", "~") for k in fragment.split("/")[1:]]
        path = (*start, *keys) if fragment.startswith("/") else start
        return path if self.at(path) is not None else None

    def at(self, path: tuple[str, ...]) -> Any:
        """What stands at `path`, None if nothing does."""
        value: Any = self.root
        for key in path:
            if isinstance(value, list):
                value = value[int(key)] if key.isdecimal() and int(key) < len(value) else None
            else:
                value = value.get(key) if isinstance(value, dict) else None
        return value

    def resolved(self, schema: Any) -> Any:
        """`schema`, or if it is a reference and nothing else of weight, what that leads to."""
        for _ in range(MAX_HOPS):
            if not isinstance(schema, dict) or reference_of(schema) is None or _constrains(schema):
                return schema
            path = self.target(schema)
            if path is None:
                return schema
            schema = self.at(path)
        return True

    def _named(self, name: str) -> tuple[str, ...] | None:
        if self._names is None:
            self._names = dict(_names(self.root, ()))
        return self._names.get(name)


def reference_of(schema: dict[str, Any]) -> Any:
    return next((schema[key] for key in _REFERENCES if key in schema), None)


def _names(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The anchors and ids within a document, and where they are."""
    if isinstance(value, dict):
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(value.get(key), str):
                yield "#" + value[key], path
        if path and isinstance(value.get("$id"), str):
            yield value["$id"], path
        for key, inner in value.items():
            yield from _names(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _names(inner, (*path, str(i)))


def _constrains(schema: dict[str, Any]) -> bool:
    return not schema.keys().isdisjoint(("properties", "required", "enum", "const", "allOf", "anyOf", "oneOf", "type"))


def kinds(schema: Any) -> frozenset[str]:
    """The types that an instance may have."""
    if schema is False:
        return frozenset()
    if not isinstance(schema, dict):
        return frozenset(TYPES)
    known = frozenset(TYPES)
    values = finite(schema)
    if values is not None:
        known &= {_kind(v) for v in values} | ({"number"} if any(_kind(v) == "integer" for v in values) else set())
    said = schema.get("type")
    if isinstance(said, str | list):
        own = {said} if isinstance(said, str) else {k for k in said if isinstance(k, str)}
        known &= own | ({"integer"} if "number" in own else set())
    return known


def finite(schema: Any) -> list[Any] | None:
    """All that an instance may be, if `schema` lists it."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    if schema.get("type") == "boolean":
        return [False, True]
    return [None] if schema.get("type") == "null" else None


def same(a: Any) -> str:
    """A text that equal JSON values share."""
    if isinstance(a, float) and a.is_integer():
        a = int(a)
    if isinstance(a, list):
        return f"[{','.join(map(same, a))}]"
    if isinstance(a, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{same(v)}" for k, v in sorted(a.items())) + "}"
    return json.dumps(a)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def disjoint(document: Document, a: Any, b: Any, of: frozenset[str] = frozenset(TYPES), depth: int = 4) -> bool:
    """Whether it is plain to see that no instance of `a` that has a type among `of` is one of `b`."""
    mine, theirs = _parts(document, a), _parts(document, b)
    common = of.intersection(*(kinds(part) for part in (*mine, *theirs)))
    if not common:
        return True
    for one in mine:
        for other in theirs:
            values, others = finite(one), finite(other)
            if values is not None and others is not None and not {same(v) for v in values} & {same(v) for v in others}:
                return True
            if common <= {"integer", "number"} and (_beyond(one, other) or _beyond(other, one)):
                return True
    return common == {"object"} and depth > 0 and _objects_disjoint(document, mine, theirs, depth)


def _parts(document: Document, schema: Any) -> list[dict[str, Any]]:
    """Schemas that all hold of an instance: `schema` itself, what it refers to, and those in allOf; a few of them."""
    pending: list[Any] = [schema]
    parts: list[dict[str, Any]] = []
    while pending and len(parts) < MAX_HOPS:
        part = pending.pop()
        if part is False:
            part = {"enum": []}
        if not isinstance(part, dict):
            continue
        parts.append(part)
        if (target := document.target(part)) is not None:
            pending.append(document.at(target))
        pending += part["allOf"] if isinstance(part.get("allOf"), list) else []
    return parts


def tags(document: Document, schema: Any) -> list[str]:
    """The properties of `schema` whose values are listed."""
    return [k for part in _parts(document, schema) for k, v in _properties(part).items() if finite(v) is not None]


def _beyond(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether all numbers of `a` are above those of `b`."""
    lowest = [(a[k], strict) for k, strict in (("minimum", 0), ("exclusiveMinimum", 1)) if _number(a.get(k))]
    highest = [(b[k], strict) for k, strict in (("maximum", 0), ("exclusiveMaximum", 1)) if _number(b.get(k))]
    return any(low > high or (low == high and s + t > 0) for low, s in lowest for high, t in highest)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _objects_disjoint(document: Document, mine: list[dict[str, Any]], theirs: list[dict[str, Any]], depth: int) -> bool:
    """By a property that both have and that differs, or that one must have and the other must not."""
    my_required, their_required = (frozenset().union(*map(_required, parts)) for parts in (mine, theirs))
    for key in my_required & their_required:
        own = [p[key] for p in map(_properties, mine) if key in p]
        other = [p[key] for p in map(_properties, theirs) if key in p]
        if any(disjoint(document, a, b, depth=depth - 1) for a in own for b in other):
            return True
    return any(_lacks(a, their_required) for a in mine) or any(_lacks(b, my_required) for b in theirs)


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: dict[str, Any]) -> frozenset[str]:
    required = schema.get("required")
    return frozenset(name for name in required if isinstance(name, str)) if isinstance(required, list) else frozenset()


def _lacks(schema: dict[str, Any], required: frozenset[str]) -> bool:
    """Whether `schema` has not, or forbids, a property among `required`."""
    properties = _properties(schema)
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    return any(properties[key] is False if key in properties else closed for key in required)
