"""Goes through a JSON schema and writes down what llguidance knows of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from thalweg.sampling.compilable import problem_of
from thalweg.server.json_schema.branches import choices, condition, negation
from thalweg.server.json_schema.cycles import Cycles
from thalweg.server.json_schema.document import (
    MAX_HOPS,
    TYPES,
    Document,
    finite,
    kinds,
    reference_of,
)
from thalweg.server.json_schema.objects import object_keywords
from thalweg.server.json_schema.patterns import FORMATS, portable
from thalweg.server.json_schema.unique import distinct_arrays

_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NOT_KEPT = ("unevaluatedItems", "maxContains", "disallow", "extends", "divisibleBy")

MAX_SECONDS = 5.0
Path = tuple[str, ...]


class RefusedError(Exception):
    """A keyword that is wrong or cannot be kept; the message begins with its path."""


class NotKeptError(RefusedError):
    """A keyword that says what it should, and cannot be kept."""


class Walk:
    """Each method adds to `made` what of `schema`, which stands at `path`, can be kept."""

    def __init__(self, schema: dict[str, Any], where: str, *, lenient: bool) -> None:
        self.document = Document(schema)
        self._where, self._lenient = where, lenient
        self._deadline = time.monotonic() + MAX_SECONDS
        self._defs: dict[str, Any] = {}
        self._names: dict[Path, str] = {}  # of what references lead to
        self._pending: list[Path] = []
        self._cycles = Cycles()

    def root(self) -> dict[str, Any]:
        made = self.walk(self.document.root, ())
        while self._pending:  # one after the other, for a chain of references may be long
            path = self._pending.pop()
            self._cycles.within = name = self._names[path]
            self._defs[name] = self.walk(self.document.at(path), path)
        self._cycles.part(self)
        made = {"enum": []} if made is False else {} if made is True else made
        return {"$defs": self._defs, **made} if self._defs else made

    def give_up(self, path: Path, reason: str, kind: type[RefusedError] = RefusedError) -> None:
        """What stands at `path` is wrong: a refusal, or nothing if it may be dropped."""
        if not self._lenient:
            where = self._where
            for key in path:
                where += f"[{key}]" if key.isdecimal() else f".{key}"
            raise kind(f"{where[:400]}: {reason}")

    def not_kept(self, path: Path, reason: str) -> None:
        """What stands at `path` cannot be kept: give_up, but another branch of anyOf may do instead."""
        self.give_up(path, reason, NotKeptError)

    def kept(self, branches: list[Any], path: Path) -> list[Any]:
        """Those of anyOf's branches that can be kept. Raises if none can."""
        made: list[Any] = []
        refused: NotKeptError | None = None
        for i, branch in enumerate(branches):
            names, pending = len(self._names), len(self._pending)
            try:
                made.append(self.walk(branch, (*path, str(i))))
            except NotKeptError as error:
                refused = refused or error
                del self._pending[pending:]
                while len(self._names) > names:  # what only this branch refers to need not be kept either
                    self._names.popitem()
        if refused is not None and not made:
            raise refused
        return made

    def walk(self, schema: Any, path: Path) -> Any:
        """The schema to compile for `schema`: true, false or an object."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self.give_up(path, f"is a {type(schema).__name__}; expected a schema")
            return True
        made: dict[str, Any] = {}
        for keyword in _NOT_KEPT:
            if schema.get(keyword) not in (None, True, {}):
                self.not_kept((*path, keyword), "is not supported")
        self._reference(schema, path, made)
        self._values(schema, path, made)
        self._numbers(schema, path, made)
        self._strings(schema, path, made)
        self._arrays(schema, path, made)
        object_keywords(self, schema, path, made)
        choices(self, schema, path, made)
        condition(self, schema, path, made)
        if "not" in schema:
            negation(self, schema, schema["not"], (*path, "not"), made)
        if "$ref" in made and (target := self.document.target(schema)) is not None:
            self._cycles.note(made, self._names[target], target, path)
        if self._lenient and schema.get("nullable") is True:  # as OpenAPI 3.0 has it; no keyword of JSON Schema
            return {"anyOf": [made, {"type": "null"}]}
        return made

    def also(self, made: dict[str, Any], schema: Any) -> None:
        """Have `made` keep to `schema` (one that was walked) too."""
        if schema not in (True, {}):
            made.setdefault("allOf", []).append(schema)

    def size(self, schema: Mapping[str, Any], keyword: str, path: Path) -> int | None:
        """A keyword that is a count."""
        value = schema.get(keyword)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        self.give_up((*path, keyword), f"is {value!r:.40}; expected a count")
        return None

    def problem(self, leaf: dict[str, Any]) -> str | None:
        """Why llguidance does not take a small schema, None if it does."""
        if time.monotonic() > self._deadline:
            return f"the schema takes more than {MAX_SECONDS:g} seconds to go through"
        return problem_of(json.dumps(leaf))

    def _reference(self, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
        reference = reference_of(schema)
        if reference is None:
            return
        target = self.document.target(schema)
        if target is None:
            self.give_up((*path, "$ref"), f"{str(reference)[:80]!r} is nothing within the schema")
            return
        if self._loops(schema):
            self.give_up((*path, "$ref"), f"{reference!r:.80} leads back to itself")
            return
        if target not in self._names:
            self._names[target] = str(len(self._names))
            self._pending.append(target)
        made["$ref"] = f"#/$defs/{self._names[target]}"

    def _loops(self, schema: dict[str, Any]) -> bool:
        """Whether references alone lead from `schema` round in a circle, or on and on."""
        value: Any = schema
        for _ in range(MAX_HOPS):
            target = self.document.target(value) if isinstance(value, dict) else None
            if target is None:
                return False
            value = self.document.at(target)
        return True

    def _values(self, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
        kind = schema.get("type")
        if kind is not None:
            said = [kind] if isinstance(kind, str) else kind
            if isinstance(said, list) and said and all(k in TYPES for k in said):
                made["type"] = kind
            else:
                self.give_up((*path, "type"), f"is {kind!r:.80}; expected {', '.join(TYPES)}, or a list of them")
        if "const" in schema:
            made["const"] = schema["const"]
        if "enum" in schema:
            if isinstance(schema["enum"], list) and schema["enum"]:
                made["enum"] = schema["enum"]
            else:
                self.give_up((*path, "enum"), "is not a list of values")

    def _numbers(self, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
        for keyword in _NUMBER:
            value = schema.get(keyword)
            if isinstance(value, bool) and keyword.startswith("exclusive"):  # as draft 4 has it
                bound = keyword.replace("exclusiveM", "m")
                if value and isinstance(schema.get(bound), int | float):
                    made[keyword] = schema[bound]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                made[keyword] = value
            elif value is not None:
                self.give_up((*path, keyword), f"is {value!r:.40}; expected a number")

    def _strings(self, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
        own: dict[str, Any] = {"type": "string"}
        for keyword in ("minLength", "maxLength"):
            if (count := self.size(schema, keyword, path)) is not None:
                own[keyword] = count
        pattern, form = schema.get("pattern"), schema.get("format")
        if isinstance(pattern, str):
            own["pattern"] = portable(pattern)
        elif pattern is not None:
            self.give_up((*path, "pattern"), "is not a string")
        if isinstance(form, str) and form in FORMATS and self.problem(own | {"format": form}) is None:
            own["format"] = form  # any other is an annotation, and so is one that does not go with the rest
        if "pattern" in own and (problem := self.problem(own)) is not None:
            self.not_kept((*path, "pattern"), f"{pattern!r:.80} cannot be kept: {problem}")
            del own["pattern"]
        made.update((k, v) for k, v in own.items() if k != "type")

    def _arrays(self, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
        items, first, rest = schema.get("items"), "prefixItems", "items"
        if isinstance(items, list):  # as drafts before 2020-12 have it
            first, rest = "items", "additionalItems"
        if isinstance(schema.get(first), list):
            made["prefixItems"] = [self.walk(s, (*path, first, str(i))) for i, s in enumerate(schema[first])]
        if rest in schema and schema[rest] is not None:
            made["items"] = self.walk(schema[rest], (*path, rest))
        for keyword in ("minItems", "maxItems"):
            if (count := self.size(schema, keyword, path)) is not None:
                made[keyword] = count
        if schema.get("contains") is not None:
            self._contains(schema, path, made)
        if schema.get("uniqueItems") is True and not self._short(made):
            values = None if "prefixItems" in made else finite(self.document.resolved(schema.get("items")))
            arrays = None if values is None else distinct_arrays(values, made.get("minItems", 0), made.get("maxItems"))
            if arrays is not None:
                for keyword in ("items", "minItems", "maxItems"):
                    made.pop(keyword, None)
                others = sorted(kinds(schema) - {"array"})
                self.also(made, {"anyOf": [{"type": others}, {"enum": arrays}]} if others else {"enum": arrays})
            else:
                reason = "cannot be kept; expected items of a small enum, or maxItems 1"
                self.not_kept((*path, "uniqueItems"), reason)

    @staticmethod
    def _short(made: dict[str, Any]) -> bool:
        closed = made.get("items") is False and len(made.get("prefixItems", ())) <= 1
        return made.get("maxItems", 2) <= 1 or closed

    def _contains(self, schema: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
        """The first items are what is to be contained."""
        least = self.size(schema, "minContains", path)
        least = 1 if least is None else least
        if "prefixItems" in made or least > 16:
            self.not_kept((*path, "contains"), "is not supported together with prefixItems or for more than 16 items")
            return
        wanted = {"allOf": [self.walk(schema["contains"], (*path, "contains")), made.get("items", True)]}
        if least:
            made["prefixItems"] = [wanted] * least
            made["minItems"] = max(least, made.get("minItems", 0))
