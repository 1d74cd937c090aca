"""Large JSON bodies, read in pieces: the event loop has its turn between them, so no body holds up others' tokens."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

PIECE_BYTES = 32_768  # read in one go, which takes about a millisecond
MAX_UNKNOWN_BYTES = 4096  # of the value of a field that no request has; of a larger one only that it is there

MAX_LARGE_DEPTH = 64  # of values larger than that, each level of which is looked through once more

MAX_CONTAINERS = 100_000  # no request needs as many, and memory is looked through for each

_NUMBERS = re.compile(rb"\s*\[[-+.eE\d,\s]*\]\s*")
_split_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_split_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class BodyRoute(APIRoute):
    """A route whose requests read their body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        known = frozenset(getattr(field.field_info.annotation, "model_fields", ())) if field is not None else None

        async def handler(request: Request) -> Response:
            return await handle(_Request(request, known))

        return handler


class _Request(Request):
    def __init__(self, request: Request, known: frozenset[str] | None) -> None:
        super().__init__(request.scope, request.receive)
        self._known = known

    async def json(self) -> Any:
        body = await self.body()
        if len(body) < PIECE_BYTES:
            return json.loads(body)
        return await loads(body, self._known)


async def loads(data: bytes, known: frozenset[str] | None = None) -> Any:
    """What json.loads gives; of an object with a field outside of `known` whose value is large, null for that value.

    Raises json.JSONDecodeError, RecursionError, ValueError for a number of too many digits, or HTTPException 400 when
    there are more than MAX_CONTAINERS objects and lists.
    """
    reader = _Reader()
    try:
        if known is not None and _kind(data) == b"{":
            fields = {
                name: raw if name in known or len(raw) <= MAX_UNKNOWN_BYTES else b"null"
                for name, raw in _split_object(data).items()
            }
            return {name: await reader.value(memoryview(raw), 1) for name, raw in fields.items()}
        return await reader.value(memoryview(data), 0)
    except msgspec.DecodeError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


class _Reader:
    def __init__(self) -> None:
        self._containers = self._bytes = 0

    async def value(self, data: memoryview, depth: int) -> Any:
        """One value of any size. Only a string is read in one go, however long, for that is quick."""
        if len(data) <= PIECE_BYTES or _kind(data) == b'"':
            return await self._loads(bytes(data))
        if depth > MAX_LARGE_DEPTH:
            raise RecursionError
        if _kind(data) == b"{":
            fields = _split_object(data).items()
            return {name: await self.value(memoryview(raw), depth + 1) for name, raw in fields}
        if _NUMBERS.fullmatch(data):
            numbers: list[Any] = []
            inside = bytes(data).strip()[1:-1]
            for part in _at_commas(inside) if inside.strip() else ():
                numbers += (await self._loads(b"[0,%b]" % part))[1:]  # so that nothing behind a comma is wrong
            return numbers
        values: list[Any] = []
        for group in _grouped(_split_list(data)):
            if len(group) == 1:
                values.append(await self.value(memoryview(group[0]), depth + 1))
            else:
                values += await self._loads(b"[%b]" % b",".join(group))
        return values

    async def _loads(self, data: bytes) -> Any:
        self._bytes += len(data)
        if self._bytes > PIECE_BYTES:
            self._bytes = 0
            await asyncio.sleep(0)
        value = json.loads(data)
        self._containers += _containers(value)
        if self._containers > MAX_CONTAINERS:
            # An HTTPException is the one kind that passes through the framework's reading of the body.
            raise HTTPException(400, f"the body has more than {MAX_CONTAINERS} objects and lists")
        return value


def _containers(value: Any) -> int:
    count, rest = 0, [value]
    while rest:
        each = rest.pop()
        if isinstance(each, dict | list):
            count += 1
            rest += [v for v in (each.values() if isinstance(each, dict) else each) if isinstance(v, dict | list)]
    return count


def _kind(data: bytes | memoryview) -> bytes:
    return bytes(data[:64]).lstrip()[:1]


def _at_commas(data: bytes) -> Iterator[bytes]:
    begin = 0
    while begin <= len(data):
        end = data.find(b",", begin + PIECE_BYTES)
        end = len(data) if end < 0 else end
        yield data[begin:end]
        begin = end + 1


def _grouped(values: list[msgspec.Raw]) -> Iterator[list[msgspec.Raw]]:
    """Neighbours that are a piece together; a value that is larger alone."""
    group: list[msgspec.Raw] = []
    size = 0
    for value in values:
        if group and size + len(value) > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(value)
        size += len(value) + 1
    if group:
        yield group
