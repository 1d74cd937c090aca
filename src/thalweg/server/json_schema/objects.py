"""What a schema says of objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thalweg.server.json_schema.document import finite
from thalweg.server.json_schema.patterns import portable

if TYPE_CHECKING:
    from thalweg.server.json_schema.walk import Path, Walk

_IN_PLACE = frozenset(("anyOf", "oneOf", "if", "dependentSchemas"))


def object_keywords(walk: Walk, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
    """Add to `made` what `schema` says of properties."""
    properties = _properties(walk, schema, path)
    required = _required(walk, schema, path)
    _dependencies(walk, schema, path, made, required)
    rest = schema.get("additionalProperties")
    rest = True if rest is None else walk.walk(rest, (*path, "additionalProperties"))
    patterns, rest = _patterns(walk, schema, path, rest)
    if schema.get("unevaluatedProperties") not in (None, True, {}) and schema.get("additionalProperties") is None:
        rest = _unevaluated(walk, schema, path, properties, rest)
    if schema.get("propertyNames") not in (None, True, {}):
        patterns, rest = _names(walk, schema["propertyNames"], (*path, "propertyNames"), properties, patterns, rest)
    _counts(walk, schema, path, made, (properties, required, patterns, rest))


def _properties(walk: Walk, schema: dict[str, Any], path: Path) -> dict[str, Any]:
    properties = schema.get("properties")
    if isinstance(properties, dict):
        return {key: walk.walk(value, (*path, "properties", key)) for key, value in properties.items()}
    if properties is not None:
        walk.give_up((*path, "properties"), "is not an object")
    return {}


def _required(walk: Walk, schema: dict[str, Any], path: Path) -> list[str]:
    required = schema.get("required")
    if required is None or required is False:
        return []
    if isinstance(required, list) and all(isinstance(name, str) for name in required):
        return list(dict.fromkeys(required))
    walk.give_up((*path, "required"), "is not a list of names")
    return []


def _dependencies(walk: Walk, schema: dict[str, Any], path: Path, made: dict[str, Any], required: list[str]) -> None:
    """What comes with a property that may be there is always required, and always holds."""
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        value = schema.get(keyword)
        if value is None:
            continue
        if not isinstance(value, dict):
            walk.give_up((*path, keyword), "is not an object")
            continue
        for name, needed in value.items():
            if isinstance(needed, list):
                required += [n for n in needed if isinstance(n, str) and n not in required]
            else:
                walk.also(made, walk.walk(needed, (*path, keyword, name)))


def _patterns(walk: Walk, schema: dict[str, Any], path: Path, rest: Any) -> tuple[dict[str, Any], Any]:
    """(patternProperties, additionalProperties): what is dropped of the former may be anything."""
    given, kept = schema.get("patternProperties"), {}
    if given is not None and not isinstance(given, dict):
        walk.give_up((*path, "patternProperties"), "is not an object")
        given = None
    for pattern, value in (given or {}).items():
        own = walk.walk(value, (*path, "patternProperties", pattern))
        if (problem := _problem(walk, pattern)) is None:
            kept[portable(pattern)] = own
        else:
            walk.not_kept((*path, "patternProperties", pattern), f"cannot be kept: {problem}")
            rest = True
    return kept, rest


def _problem(walk: Walk, pattern: str) -> str | None:
    return walk.problem({"type": "string", "pattern": portable(pattern)})


def _unevaluated(walk: Walk, schema: dict[str, Any], path: Path, properties: dict[str, Any], rest: Any) -> Any:
    """additionalProperties in place of unevaluatedProperties; `properties` gets those that allOf and $ref have."""
    names: set[str] = set()
    pending, simple, seen = [schema], True, 0
    while pending and simple and seen < 1000:
        part, seen = pending.pop(), seen + 1
        if not isinstance(part, dict):
            continue
        simple = not (_IN_PLACE & part.keys()) and (part is schema or not part.get("patternProperties"))
        if part is not schema and isinstance(part.get("properties"), dict):
            names.update(part["properties"])
        pending += part["allOf"] if isinstance(part.get("allOf"), list) else []
        if (target := walk.document.target(part)) is not None:
            pending.append(walk.document.at(target))
    if not simple or seen >= 1000:
        walk.not_kept((*path, "unevaluatedProperties"), "is not supported beside anyOf, oneOf, if or patternProperties")
        return rest
    for name in sorted(names):
        properties.setdefault(name, True)
    return walk.walk(schema["unevaluatedProperties"], (*path, "unevaluatedProperties"))


def _names(
    walk: Walk, names: Any, path: Path, properties: dict[str, Any], patterns: dict[str, Any], rest: Any
) -> tuple[dict[str, Any], Any]:
    """(patternProperties, additionalProperties) for propertyNames; `properties` gets names that are listed."""
    names = walk.document.resolved(names)
    if names is False:
        properties.update(dict.fromkeys(properties, False))
        return {}, False
    if not isinstance(names, dict):
        walk.give_up(path, "is not a schema")
        return patterns, rest
    if (listed := finite(names)) is not None:
        allowed = [name for name in listed if isinstance(name, str)]
        for name in properties.keys() - set(allowed):
            properties[name] = False
        if patterns:
            walk.not_kept(path, "is not supported beside patternProperties")
        elif rest is not False:
            for name in allowed:
                properties.setdefault(name, rest)
        return patterns, False
    said = set(names) & {"pattern", "minLength", "maxLength", "format", "not", "anyOf", "allOf", "$ref"}
    if not said:
        return patterns, rest
    least, most = walk.size(names, "minLength", path), walk.size(names, "maxLength", path)
    pattern = names.get("pattern")
    if least is not None or most is not None:
        pattern = rf"^[\s\S]{{{least or 0},{'' if most is None else most}}}$" if pattern is None else None
    if properties or patterns or said - {"pattern", "minLength", "maxLength"} or not isinstance(pattern, str):
        walk.not_kept(path, "is only supported as an enum, or without properties as a pattern or a length")
    elif (problem := _problem(walk, pattern)) is not None:
        walk.not_kept((*path, "pattern"), f"{pattern!r:.80} cannot be kept: {problem}")
    else:
        return {portable(pattern): rest}, False
    return patterns, rest


def _counts(
    walk: Walk,
    schema: dict[str, Any],
    path: Path,
    made: dict[str, Any],
    parts: tuple[dict[str, Any], list[str], dict[str, Any], Any],
) -> None:
    """min- and maxProperties are known to llguidance if every property is required; to that they are brought here."""
    properties, required, patterns, rest = parts
    least, most = walk.size(schema, "minProperties", path) or 0, walk.size(schema, "maxProperties", path)
    possible = [name for name, value in properties.items() if value is not False]
    if least > len(required):
        for name in possible:
            if name not in required and len(required) < least:
                required.append(name)
    optional = [name for name in possible if name not in required]
    if most is not None and (optional or len(required) > most):
        room = most - len(required)
        if room < 0:
            walk.give_up((*path, "maxProperties"), f"is {most} and {len(required)} properties are required")
        elif len(optional) > room or rest is not False or patterns:
            properties.update(dict.fromkeys(optional[room:], False))
            for name in required:  # where no pattern and not the rest will tell any more what they are
                properties.setdefault(name, {"allOf": [*patterns.values(), rest]} if patterns else rest)
            patterns, rest = {}, False
        most = None
    if len(required) >= least:
        least = 0
    if properties:
        made["properties"] = properties
    if required:
        made["required"] = required
    if patterns:
        made["patternProperties"] = patterns
    if rest is not True:
        made["additionalProperties"] = rest
    if least:
        made["minProperties"] = least
    if most is not None:
        made["maxProperties"] = most
