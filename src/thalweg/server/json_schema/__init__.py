"""JSON schemas as generators write them, made into ones that llguidance compiles and that allow no more.

`strict` is for a response's schema: what can neither be kept nor approximated from within is refused, with keyword and
path. `lenient` is for a tool's parameters: what cannot be kept is dropped.
"""

from __future__ import annotations

from typing import Any

from thalweg.sampling.compilable import compiles
from thalweg.server.json_schema.walk import RefusedError, Walk

__all__ = ["RefusedError", "lenient", "strict"]


def strict(schema: dict[str, Any], where: str) -> dict[str, Any]:
    """A schema whose every instance is one of `schema` too; RefusedError says what in `where` cannot be kept."""
    return Walk(schema, where, lenient=False).root()


def lenient(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with whatever cannot be compiled dropped; any object if that is not enough."""
    prepared = Walk(schema, "", lenient=True).root()
    return prepared if compiles(prepared) else {"type": "object"}
