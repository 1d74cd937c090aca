"""What every request passes first: the API key, the body's size and how long it takes to come."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thalweg.server.errors import ApiError

OPEN_PATHS = frozenset({"/health"})
PAGES = frozenset({"/", "/dashboard"})
_CALLER = "thalweg.caller"


def caller(request: Request) -> bytes:
    """Who asks, as far as it is known: a digest of the API key that came; empty if the server wants none."""
    digest: bytes = request.scope.get(_CALLER, b"")
    return digest


class Guard:
    """ASGI middleware. The path is the scope's own, which no header can change."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_body_bytes: int, body_seconds: float) -> None:
        self._app = app
        self._callers = {key.encode(): hashlib.sha256(key.encode()).digest() for key in api_keys}
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = dict(scope["headers"]), scope["path"]
        if self._callers and (digest := self._digest(headers)) is not None:
            scope[_CALLER] = digest
        elif self._callers and path not in OPEN_PATHS:
            refused = ApiError(
                401,
                "the API key is missing or wrong; expected the header Authorization: Bearer KEY, or x-api-key: KEY"
                " (--api-key)",
                code="invalid_api_key",
                # Where the pages are, a browser asks for the key, as the password of whatever name.
                headers={"WWW-Authenticate": 'Basic realm="API key"' if path in PAGES else "Bearer"},
            )
            await refused.response(path)(scope, receive, send)
            return
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            await self._too_large().response(path)(scope, receive, send)
            return
        if (encoding := headers.get(b"content-encoding", b"identity")).lower() != b"identity":
            said = f"the body is encoded as {encoding[:40].decode('latin-1')}; expected it without Content-Encoding"
            await ApiError(415, said, code="unsupported").response(path)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _digest(self, headers: dict[bytes, bytes]) -> bytes | None:
        """Of the key that `headers` have; None if it is none of ours."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        scheme = scheme.lower()
        if scheme == b"basic":
            # A browser sends Basic by itself, so another site's page could have it sent: it names its origin then.
            given = _password(given) if _own_page(headers) else b""
        elif scheme != b"bearer":
            given = b""
        found = None
        for key, digest in self._callers.items():  # all of them, so that the time tells nothing
            for came in (given, headers.get(b"x-api-key", b"")):
                if hmac.compare_digest(came, key):
                    found = digest
        return found

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
