"""The server of the pages over a double of the engine, in a thread, for browsers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tests.unit.server_double import ClientDouble
from thalweg.server.app import create_app
from thalweg.server.settings import ServerSettings


@contextmanager
def page_server(client: ClientDouble, settings: ServerSettings | None = None) -> Iterator[str]:
    """Its address."""
    app = create_app(client, settings or ServerSettings())  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
