"""What every request passes first: the API key, the body's size and how long it takes to come."""

from __future__ import annotations

import asyncio
import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thalweg.server.errors import ApiError

OPEN_PATHS = frozenset({"/health"})


class Guard:
    """ASGI middleware. The path is the scope's own, which no header can change."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, body_seconds: float) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
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
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refused.response()(scope, receive, send)
        elif int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            await self._too_large().response()(scope, receive, send)
        else:
            await self._app(scope, self._bounded(receive), send)

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._expected is None or path in OPEN_PATHS:
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self._expected)

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
