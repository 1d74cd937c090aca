"""What a schema says by other schemas: all, any and one of some, conditions, negations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thalweg.server.json_schema.document import disjoint, finite, kinds, same, tags

if TYPE_CHECKING:
    from thalweg.server.json_schema.walk import Path, Walk

MAX_BRANCHES = 128  # of oneOf, each of which is compared with each
MAX_TAGS = 4  # that are tried


def choices(walk: Walk, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
    for keyword in ("allOf", "anyOf", "oneOf"):
        branches = schema.get(keyword)
        if branches is None:
            continue
        if not isinstance(branches, list) or not branches:
            walk.give_up((*path, keyword), "is not a list of schemas")
            continue
        if keyword == "allOf":
            branches = [_with_known(branch, schema) for branch in branches]
        if keyword == "anyOf":
            own = walk.kept(branches, (*path, keyword))
        else:
            own = [walk.walk(b, (*path, keyword, str(i))) for i, b in enumerate(branches)]
        if keyword == "allOf":
            for branch in own:
                walk.also(made, branch)
            continue
        if keyword == "oneOf":
            own = _exclusive(walk, schema, branches, own, (*path, keyword))
        own = [branch for branch in own if branch is not False]
        values = [value for branch in own if isinstance(branch, dict) for value in finite(branch) or ()]
        if own and all(isinstance(b, dict) and len(b) == 1 and finite(b) is not None for b in own):
            walk.also(made, {"enum": values})  # one terminal instead of a rule for each
        elif own and "anyOf" not in made:
            made["anyOf"] = own
        else:
            walk.also(made, {"anyOf": own} if own else False)


def _with_known(branch: Any, schema: dict[str, Any]) -> Any:
    """A branch of the allOf of `schema` that has a condition, with what `schema` says of the properties it is on."""
    condition = branch.get("if") if isinstance(branch, dict) and "properties" not in branch else None
    asked, known = condition.get("properties") if isinstance(condition, dict) else None, schema.get("properties")
    if not isinstance(asked, dict) or not isinstance(known, dict):
        return branch
    return {"properties": {name: known[name] for name in asked if name in known}, **branch}


def _exclusive(walk: Walk, schema: dict[str, Any], raw: list[Any], own: list[Any], path: Path) -> list[Any]:
    """The branches of oneOf as those of anyOf, if no instance is of two."""
    of = kinds(schema)
    names = [b.get("required") if isinstance(b, dict) and b.keys() <= {"required", "title"} else None for b in raw]
    if of == {"object"} and len(raw) > 1 and all(_names(n) for n in names):
        return _one_of_required([n for n in names if n])
    lists = [finite(walk.document.resolved(b)) for b in raw]
    if all(values is not None for values in lists):
        texts = [same(value) for values in lists for value in values or ()]
        if len(set(texts)) == len(texts):
            return own
    if len(raw) > MAX_BRANCHES:
        walk.give_up(path, f"has {len(raw)} branches; expected at most {MAX_BRANCHES}, or anyOf")
        return own
    if (both := _overlap(walk, raw, of)) is None:
        return own
    for tag in _tags(walk, schema, raw):
        needed = {"required": [tag]}
        if _overlap(walk, [{"allOf": [branch, needed]} for branch in raw], of) is None:
            # What has the tag is of no two branches, whether they require it or not.
            return [{"allOf": [branch, needed]} for branch in own]
    reason = f"cannot be kept: its branches {both[0]} and {both[1]} may both match; expected anyOf, or a property"
    walk.not_kept(path, f"{reason} with a const of its own in each branch")
    return own


def _overlap(walk: Walk, branches: list[Any], of: frozenset[str]) -> tuple[int, int] | None:
    """The first two branches that may have an instance in common."""
    for i, branch in enumerate(branches):
        for j in range(i):
            if not disjoint(walk.document, branches[j], branch, of):
                return j, i
    return None


def _tags(walk: Walk, schema: dict[str, Any], branches: list[Any]) -> list[str]:
    """Properties that may tell the branches of oneOf apart; OpenAPI's discriminator names the one that does."""
    discriminator = schema.get("discriminator")
    if isinstance(discriminator, dict) and isinstance(name := discriminator.get("propertyName"), str):
        return [name]
    listed = [tags(walk.document, branch) for branch in branches]
    return [name for name in listed[0] if all(name in other for other in listed)][:MAX_TAGS]


def condition(walk: Walk, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
    """if, then, else: what meets the condition and `then`, or is known not to meet it and meets `else`."""
    if "if" not in schema:
        return
    condition = walk.walk(schema["if"], (*path, "if"))
    then, otherwise = (walk.walk(schema.get(k, True), (*path, k)) for k in ("then", "else"))
    trivial: tuple[Any, ...] = (True, {})
    if then in trivial and otherwise in trivial:
        return
    other = _unmet(walk, schema, schema["if"])
    if other is not None:
        walk.also(made, {"anyOf": [{"allOf": [condition, then]}, {"allOf": [other, otherwise]}]})
    elif otherwise in trivial:
        walk.also(made, then)
    elif then in trivial:
        walk.also(made, {"anyOf": [condition, otherwise]})
    else:
        walk.also(made, {"anyOf": [{"allOf": [condition, then]}, {"allOf": [then, otherwise]}]})


def _unmet(walk: Walk, schema: dict[str, Any], condition: Any) -> dict[str, Any] | None:
    """What does not meet a condition on one property of which all values are known."""
    if not isinstance(condition, dict) or condition.keys() - {"properties", "required", "type"}:
        return None
    properties, known = condition.get("properties"), schema.get("properties")
    if not isinstance(properties, dict) or len(properties) != 1 or not isinstance(known, dict):
        return None
    [(key, value)] = properties.items()
    every, met = finite(walk.document.resolved(known.get(key))), finite(value)
    rest = None if every is None or met is None else [v for v in every if v not in met]
    return {"properties": {key: {"enum": rest}}, "required": [key]} if rest else None


def negation(walk: Walk, schema: dict[str, Any], denied: Any, path: Path, made: dict[str, Any]) -> None:
    if denied is False:
        return
    keys = list(denied) if isinstance(denied, dict) else []
    names = denied["required"] if keys == ["required"] else None
    values, known = finite(denied), finite(schema)
    if denied is True or denied == {}:
        walk.also(made, False)
    elif values is not None and known is not None and len(keys) == 1:
        rest = [v for v in known if v not in values]
        walk.also(made, {"enum": rest} if rest else False)
    elif keys == ["type"]:
        types = kinds(schema) - kinds(denied)
        if "integer" not in types:
            types -= {"number"}  # which would take integers in
        walk.also(made, {"type": sorted(types)} if types else False)
    elif isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        walk.also(made, {"properties": {names[0]: False}})
    elif keys == ["anyOf"] and isinstance(denied["anyOf"], list):
        for i, one in enumerate(denied["anyOf"]):
            negation(walk, schema, one, (*path, "anyOf", str(i)), made)
    else:
        walk.not_kept(path, "is not supported but for values of an enum, types, and one property")


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _one_of_required(names: list[list[str]]) -> list[dict[str, Any]]:
    """Branches that each require their own properties and forbid those of the others."""
    branches = []
    for i, own in enumerate(names):
        others = [set(other) - set(own) for j, other in enumerate(names) if j != i]
        if all(others):
            denied = dict.fromkeys(sorted(set().union(*others)), False)
            branches.append({"required": own, "properties": denied})
    return branches
