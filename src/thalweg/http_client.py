"""A small HTTP/1.1 client for measuring servers: asyncio streams, h11's parser, nothing between it and the clock."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import h11

from thalweg.errors import ConfigError, ThalwegError

READ_BYTES = 65_536
MAX_ANSWER_BYTES = 64 << 20  # of a whole answer, or of one event
CONNECT_SECONDS = 30.0


class HttpError(ThalwegError):
    """A server that cannot be reached, breaks off, or does not speak HTTP. One line."""


class HttpClient:
    """Requests to one server. Connections are kept and used again, as many at once as there are requests.

    `base_url` is http(s)://host[:port][/path]; the path goes before every request's. Raises ConfigError.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError:
            url, port = urlsplit(""), None
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"--base-url is {base_url!r}; expected http://HOST:PORT or https://HOST")
        self.host, self.port = url.hostname, port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/")
        self._headers = [("Host", url.netloc.rpartition("@")[2]), ("Accept", "*/*")]
        if api_key is not None:
            self._headers.append(("Authorization", f"Bearer {api_key}"))
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def request(self, method: str, path: str, body: Any = None) -> AsyncIterator[Answer]:
        """The answer, whose body is still to be read. Leaving before its end closes the connection, which a server
        sees as a client that left. `body` goes as JSON. Raises HttpError.
        """
        content = b"" if body is None else json.dumps(body).encode()
        headers = [*self._headers, ("Content-Length", str(len(content)))]
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        head = h11.Request(method=method, target=self._prefix + path, headers=headers)
        connection, answer = None, None
        while answer is None:
            kept = self._take_idle()
            connection = kept or await self._connect()
            try:
                answer = await connection.send(head, content)
            except BaseException as error:
                connection.close()
                # A server may close a kept connection just when it is used again; that is not an answer to the request.
                if kept is None or not isinstance(error, HttpError):
                    raise
        assert connection is not None
        try:
            yield answer
        finally:
            if connection.finished():
                self._idle.append(connection)
            else:
                connection.close()

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer with status 200. Raises HttpError for any other."""
        async with self.request(method, path, body) as answer:
            content = await answer.read()
        if answer.status != 200:
            raise HttpError(f"{method} {path} answered {answer.status}: {error_message(content)}")
        try:
            return json.loads(content)
        except ValueError:
            raise HttpError(f"{method} {path} gave an answer that is not JSON: {content[:80]!r}") from None

    async def first_model(self) -> str:
        """The first name that /v1/models lists. Raises HttpError."""
        listed = await self.json("GET", "/v1/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise HttpError("GET /v1/models names no model; name one with --model") from None

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.alive():
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self._tls)
        except TimeoutError:
            raise HttpError(f"{self.host}:{self.port} did not answer within {CONNECT_SECONDS:g} s") from None
        except OSError as e:
            raise HttpError(f"{self.host}:{self.port} cannot be reached: {_reason(e)}") from None
        return _Connection(reader, writer)


class Answer:
    """Status and headers, and the body as it comes."""

    def __init__(self, connection: _Connection, head: h11.Response) -> None:
        self.status = head.status_code
        self._headers = head.headers
        self._connection = connection

    def header(self, name: str) -> str | None:
        """The first header of that name, whatever its capitals."""
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self._headers if key == wanted), None)

    async def read(self) -> bytes:
        """The whole body."""
        pieces, size = [], 0
        async for data in self._data():
            pieces.append(data)
            size += len(data)
            if size > MAX_ANSWER_BYTES:
                raise HttpError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return b"".join(pieces)

    async def events(self) -> AsyncGenerator[bytes]:
        """The data of each server-sent event."""
        rest, lines = b"", []
        async for data in self._data():
            *complete, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_ANSWER_BYTES:
                raise HttpError(f"an event is longer than {MAX_ANSWER_BYTES} bytes")
            for line in complete:
                line = line.removesuffix(b"\r")
                if line.startswith(b"data:"):
                    lines.append(line[5:].removeprefix(b" "))
                elif not line and lines:
                    yield b"\n".join(lines)
                    lines = []

    async def _data(self) -> AsyncGenerator[bytes]:
        while isinstance(event := await self._connection.next_event(), h11.Data):
            yield bytes(event.data)


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._state = h11.Connection(h11.CLIENT, max_incomplete_event_size=READ_BYTES)

    def alive(self) -> bool:
        return not (self._reader.at_eof() or self._writer.is_closing())

    def finished(self) -> bool:
        """Whether the answer was read to its end and the connection serves another request."""
        if self._state.our_state is h11.DONE and self._state.their_state is h11.DONE:
            self._state.start_next_cycle()
            return self.alive()
        return False

    def close(self) -> None:
        self._writer.close()

    async def send(self, head: h11.Request, content: bytes) -> Answer:
        data = self._state.send(head) or b""
        if content:
            data += self._state.send(h11.Data(data=content)) or b""
        data += self._state.send(h11.EndOfMessage()) or b""
        # What was refused early is answered while the body is still being sent; the answer is what counts then.
        with suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()
        while not isinstance(event := await self.next_event(), h11.Response):
            pass  # 1xx
        return Answer(self, event)

    async def next_event(self) -> Any:
        try:
            while (event := self._state.next_event()) is h11.NEED_DATA:
                data = await self._reader.read(READ_BYTES)
                if not data and self._state.their_state is h11.SEND_RESPONSE:
                    raise HttpError("the server closed the connection without an answer")
                self._state.receive_data(data)
        except h11.RemoteProtocolError as e:
            raise HttpError(f"the server broke off or does not speak HTTP: {e}") from None
        except OSError as e:
            raise HttpError(f"the connection was lost: {_reason(e)}") from None
        return event


def _reason(e: OSError) -> str:
    return os.strerror(e.errno).lower() if e.errno and e.errno > 0 else str(e)


def error_message(content: bytes) -> str:
    """What an error's body says: OpenAI's error.message, or its beginning."""
    with suppress(ValueError):
        body = json.loads(content)
        error = body.get("error", body) if isinstance(body, dict) else body
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str):
            return " ".join(message.split())[:300]
    return " ".join(content.decode("utf-8", "replace").split())[:300] or "nothing"
