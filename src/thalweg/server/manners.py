"""What holds for every route: HEAD wherever GET is, an id for each request, redirects that stay on this server."""

from __future__ import annotations

import logging
import uuid
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG

from thalweg.server.errors import ANTHROPIC

REQUEST_ID = b"x-request-id"
MAX_ID_CHARS = 128

_request_id: ContextVar[str] = ContextVar("request_id", default="")


class Manners:
    """ASGI middleware, to be outside of all others, so that their answers have an id too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _id_of(scope["headers"])
        _request_id.set(request_id)  # each request has a task, and so a context, of its own
        is_head = scope["method"] == "HEAD"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, _ours(name, value)) for name, value in message["headers"]]
                ids = (REQUEST_ID, b"request-id") if scope["path"].startswith(ANTHROPIC) else (REQUEST_ID,)
                message = {**message, "headers": [*headers, *((name, request_id.encode()) for name in ids)]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"} if is_head else scope, receive, answer)


class WithRequestId(logging.Filter):
    """Gives each record `request_id`, of the request that the line is about, and the same in brackets."""

    def filter(self, record: logging.LogRecord) -> bool:
        request_id = _request_id.get()
        record.request_id = request_id or "-"
        record.bracketed_id = f"[{request_id}] " if request_id else ""
        return True


def log_config(level: str) -> dict[str, Any]:
    """uvicorn's logging with request ids in it, and this package's own loggers beside it."""
    config = deepcopy(LOGGING_CONFIG)
    config["filters"] = {"request_id": {"()": WithRequestId}}
    for handler in config["handlers"].values():
        handler["filters"] = ["request_id"]
    config["formatters"]["default"]["fmt"] = "%(levelprefix)s %(bracketed_id)s%(message)s"
    config["formatters"]["access"]["fmt"] += " %(request_id)s"
    config["loggers"]["thalweg"] = {"handlers": ["default"], "level": level.upper(), "propagate": False}
    return config


def _id_of(headers: list[tuple[bytes, bytes]]) -> str:
    """What the client calls its request, as far as that can stand in a header and a line; else a new one."""
    given = dict(headers).get(REQUEST_ID, b"")
    return bytes(c for c in given if 0x20 < c < 0x7F)[:MAX_ID_CHARS].decode() or uuid.uuid4().hex


def _ours(name: bytes, value: bytes) -> bytes:
    """A header's value, of which the framework does not know what is done here."""
    if name == b"location":
        return _relative(value)
    return value + b", HEAD" if name == b"allow" and b"GET" in value.split(b", ") else value


def _relative(location: bytes) -> bytes:
    """The framework makes an absolute URL of the Host header, which is the client's word, and not a proxy's address."""
    _, scheme, rest = location.partition(b"://")
    if not scheme:
        return location
    return b"/" + rest.partition(b"/")[2].lstrip(b"/")  # never `//host`
