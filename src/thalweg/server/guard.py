"""What every request passes first: the API key, the body's size and how long it takes to come."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thalweg.server.errors import ApiError

OPEN_PATHS = frozenset({"/health"})
PAGE = "/"


class Guard:
    """ASGI middleware. The path is the scope's own, which no header can change."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, body_seconds: float) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._allowed(scope["path"], headers):
            refused = ApiError(
                401,
                "the API key is missing or wrong; expected the header Authorization: Bearer KEY (--api-key)",
                code="invalid_api_key",
                # Where the page is, a browser asks for the key, as the password of whatever name.
                headers={"WWW-Authenticate": 'Basic realm="API key"' if scope["path"] == PAGE else "Bearer"},
            )
            await refused.response()(scope, receive, send)
        elif int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            await self._too_large().response()(scope, receive, send)
        else:
            await self._app(scope, self._bounded(receive), send)

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        scheme = scheme.lower()
        if scheme == b"bearer":
            return hmac.compare_digest(given, self._key)
        # A browser sends Basic by itself, so another site's page could have it sent: such a request names its origin.
        return scheme == b"basic" and _own_page(headers) and hmac.compare_digest(_password(given), self._key)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, for bodies that do not say how long they are, and those that never end."""
        received, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._body_seconds

        async def bounded() -> Message:
            # An HTTPException is the one kind that passes through the framework's reading of the body.
            nonlocal received, whole
            if whole:
                return await receive()  # the client's leaving, for which there is no hurry
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body has not come within {self._body_seconds:g} s") from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if received > self._max_body_bytes:
                    raise HTTPException(413, str(self._too_large()))
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large")


def _own_page(headers: dict[bytes, bytes]) -> bool:
    origin = headers.get(b"origin")
    return origin is None or origin.partition(b"://")[2] == headers.get(b"host")


def _password(given: bytes) -> bytes:
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
