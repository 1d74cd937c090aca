"""HTTP/1.1 on one connection: what is not a request, how large its head may be, and how long anybody waits for it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from thalweg.server.errors import ApiError
from thalweg.server.settings import MAX_HEADER_BYTES

HEADER_SECONDS = 30.0

_HEAD_END = re.compile(rb"\n\r?\n")
_BODY_LENGTH = re.compile(rb"^(content-length|transfer-encoding):(.*)$", re.IGNORECASE | re.MULTILINE)
_HTTP_1_0 = re.compile(rb"[^\n]* HTTP/1\.0\r?\n")


class StrictConnection(h11.Connection):
    """h11's parser, but a head may have MAX_HEADER_BYTES and no more, however its bytes arrive, and only one header of
    it says how long the body is (RFC 9112, 6.3): a proxy before this server may believe the other one."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.refusal: ApiError | None = None  # of what next_event raised an error for

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE:
                self._check_head(self.trailing_data[0])
            return super().next_event()
        except h11.RemoteProtocolError as error:
            status = 431 if error.error_status_hint == 431 else 400
            self.refusal = ApiError(status, f"this is not a valid HTTP request: {error}", code="invalid_http")
            raise

    def _check_head(self, data: bytes) -> None:
        end = _HEAD_END.search(data)
        size = len(data) + 1 if end is None else end.end()
        if size > MAX_HEADER_BYTES:
            raise h11.RemoteProtocolError(f"its head is larger than {MAX_HEADER_BYTES} bytes", 431)
        if end is None:
            return
        head = data[:size]
        lengths = _BODY_LENGTH.findall(head)
        if len(lengths) > 1 or any(b"," in value for _, value in lengths):
            raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding; expected one of them, once")
        if lengths and lengths[0][0].lower() == b"transfer-encoding" and _HTTP_1_0.match(head):
            raise h11.RemoteProtocolError("HTTP/1.0 with Transfer-Encoding")


class PromptProtocol(H11Protocol):
    """uvicorn's HTTP, but strict, and a connection on which a request has begun to come, or a new one on which none
    has, is closed if the request's head is not whole within HEADER_SECONDS."""

    header_seconds = HEADER_SECONDS
    _waiting: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: StrictConnection = StrictConnection()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """As every other error of this server, with the status that fits."""
        error = self.conn.refusal
        if error is not None and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode(error.body())
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            head = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()  # after an answer that has begun, there is nothing more to say

    def _look(self) -> None:
        """Wait for the rest of a head that has begun, or of a body that was answered before its end; between requests
        uvicorn's timer closes the connection."""
        begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        if not (begun and self._is_idle()):
            self._wait_no_more()
        elif self._waiting is None:
            self._wait()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self.header_seconds, self._close_unless_asked)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _close_unless_asked(self) -> None:
        if self._is_idle() and not self.transport.is_closing():
            self.transport.close()
