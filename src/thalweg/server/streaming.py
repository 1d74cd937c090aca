"""Answers that end with the client: server-sent events, and whole answers given up when nobody waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Send

from thalweg.errors import ThalwegError
from thalweg.server.errors import ApiError, told
from thalweg.server.responses import encode, json_response

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": keep-alive\n\n"  # a comment, which clients pass over
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_CLIENT_GONE = 499  # nobody reads it; access logs do


class Wire(Protocol):
    """How an API's streams are written."""

    end: bytes  # of a stream that ended well

    def event(self, chunk: Any) -> bytes: ...

    def error(self, error: ApiError) -> bytes:
        """The last events of a stream that broke off."""


class Chunks:
    """Events without names, as OpenAI's chats and completions have them."""

    end = DONE

    def event(self, chunk: Any) -> bytes:
        return b"data: " + encode(chunk) + b"\n\n"

    def error(self, error: ApiError) -> bytes:
        return self.event(error.body())


class NamedEvents:
    """Events that are named by their `type`; `failed` makes the last ones of what a stream broke off with."""

    end = b""

    def __init__(self, failed: Callable[[ApiError], list[dict[str, Any]]]) -> None:
        self._failed = failed

    def event(self, chunk: dict[str, Any]) -> bytes:
        return b"event: %b\ndata: %b\n\n" % (chunk["type"].encode(), encode(chunk))

    def error(self, error: ApiError) -> bytes:
        return b"".join(map(self.event, self._failed(error)))


_CHUNKS = Chunks()


async def stream(
    request: Request,
    chunks: AsyncGenerator[Any],
    taken: asyncio.Event,
    ping_seconds: float,
    wire: Wire = _CHUNKS,
) -> Response:
    """`chunks` as events of `wire`.

    The response begins once the request is `taken` in, so what is wrong with it has a status of its own; after
    `ping_seconds` it begins in any case. A later error is the last event. Whenever there was nothing to say for
    `ping_seconds` (0: never), a comment goes out, so that proxies do not take the connection for dead. When the client
    leaves, `chunks` is closed.
    """
    first = asyncio.ensure_future(anext(chunks))
    begun, gone = asyncio.ensure_future(taken.wait()), asyncio.ensure_future(_disconnected(request))
    keep = False
    try:
        await asyncio.wait([first, begun, gone], timeout=ping_seconds or None, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not first.done():
            return Response(status_code=_CLIENT_GONE)
        if first.done():
            first.result()  # raises what has a status of its own
        keep = True
    finally:
        await _end(begun, gone, *(() if keep else (first,)))
        if not keep:
            await chunks.aclose()
    return _EventStream(request, first, chunks, ping_seconds, wire)


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

    def __init__(
        self,
        request: Request,
        first: asyncio.Future[Any],
        rest: AsyncGenerator[Any],
        ping_seconds: float,
        wire: Wire,
    ) -> None:
        super().__init__(self._events(request), headers=_HEADERS, media_type="text/event-stream")
        self._first, self._rest, self._ping_seconds, self._wire = first, rest, ping_seconds, wire

    async def stream_response(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        pings: asyncio.Task[None] | None = None
        last = loop.time()

        async def timed(message: Message) -> None:
            nonlocal last
            last = loop.time()
            if pings is not None and not message.get("more_body", True):
                pings.cancel()  # nothing may follow
            await send(message)

        async def ping() -> None:
            while True:
                await asyncio.sleep(last + self._ping_seconds - loop.time())
                if loop.time() - last >= self._ping_seconds:
                    await timed({"type": "http.response.body", "body": PING, "more_body": True})

        if self._ping_seconds:
            pings = asyncio.create_task(ping())
        try:
            await super().stream_response(timed)
        finally:
            if pings is not None:
                pings.cancel()
            if not self._first.cancel():  # which, while it runs, ends the generator with it
                await self._rest.aclose()

    async def _events(self, request: Request) -> AsyncGenerator[bytes]:
        try:
            yield self._wire.event(await self._first)
            async for chunk in self._rest:
                yield self._wire.event(chunk)
        except Exception as error:  # noqa: BLE001 -- the status is sent; an event is what is left to say it with
            if not isinstance(error, (ApiError, ThalwegError)):
                _log.exception("a stream broke off")
            yield self._wire.error(told(request, error))
        else:
            if self._wire.end:
                yield self._wire.end


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`; ClientGone, and `work` cancelled, when the client leaves first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end(task, gone)


async def _disconnected(request: Request) -> None:
    # The body was read, so all that can come is the end.
    while (await request.receive())["type"] != "http.disconnect":
        pass
