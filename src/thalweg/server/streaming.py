"""Answers that end with the client: server-sent events, and whole answers given up when nobody waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from thalweg.errors import ThalwegError
from thalweg.server.errors import ApiError, told
from thalweg.server.responses import encode, json_response

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_CLIENT_GONE = 499  # nobody reads it; access logs do


def event(data: Any) -> bytes:
    """One server-sent event with `data` as JSON."""
    return b"data: " + encode(data) + b"\n\n"


async def stream(request: Request, chunks: AsyncGenerator[Any]) -> Response:
    """`chunks` as events, [DONE] at the end.

    The response begins with the first chunk, so what fails before it has a status of its own. A later error is the
    last event. When the client leaves, `chunks` is closed.
    """
    try:
        first = await _unless_gone(request, anext(chunks))
    except ClientGone:
        await chunks.aclose()
        return Response(status_code=_CLIENT_GONE)
    return _EventStream(_events(request, first, chunks))


async def whole(request: Request, body: Awaitable[Any]) -> Response:
    """`body` as JSON. When the client leaves, it is cancelled."""
    try:
        return json_response(await _unless_gone(request, body))
    except ClientGone:
        return Response(status_code=_CLIENT_GONE)


class ClientGone(Exception):
    """The connection was closed from the other side."""


class _EventStream(StreamingResponse):
    """Closes its generator when the response ends, however it ends; left to the garbage collector, sequences would
    go on decoding for nobody."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(events, headers=_HEADERS, media_type="text/event-stream")
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def _events(request: Request, first: Any, rest: AsyncGenerator[Any]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        try:
            yield event(first)
            async for chunk in rest:
                yield event(chunk)
        except Exception as error:  # noqa: BLE001 -- the status is sent; an event is what is left to say it with
            if not isinstance(error, (ApiError, ThalwegError)):
                _log.exception("a stream broke off")
            yield event(told(request, error).body())
        else:
            yield DONE


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`; ClientGone, and `work` cancelled, when the client leaves first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    # The body was read, so all that can come is the end.
    while (await request.receive())["type"] != "http.disconnect":
        pass
