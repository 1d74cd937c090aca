"""`serve`: an engine and an HTTP server until a signal ends them."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence

import uvicorn

from thalweg.config.engine import EngineConfig
from thalweg.engine.client import EngineClient
from thalweg.errors import ConfigError
from thalweg.server.app import create_app
from thalweg.server.settings import ServerSettings

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
DRAIN_SECONDS = 30


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: Sequence[str] = (),
    log_level: str = "warning",
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    drain_seconds: int = DRAIN_SECONDS,
) -> None:
    """Serve until SIGTERM or SIGINT, then let requests under way finish for up to `drain_seconds` and return.

    Port 0 takes a free one. Where it listens is printed once requests can be served; "info" logs each request.
    Raises ConfigError for an option that cannot be honoured, and whatever kept the engine from starting.
    """
    _check(port, api_key, served_model_name, log_level)
    client = EngineClient(config)
    settings = ServerSettings(
        served_model_names=tuple(served_model_name),
        api_key=api_key,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
    )
    failure: Exception | None = None

    def on_started(error: Exception | None) -> None:
        nonlocal failure
        if error is not None:
            failure, server.should_exit = error, True
            return
        info = client.info
        summary = (
            f"{info.architecture} on {info.device}, {info.dtype}",
            *info.memory_split,
            f"decode steps    {info.decode_steps}",
        )
        print(*summary, sep="\n  ", file=sys.stderr, flush=True)
        names = ", ".join(settings.served_model_names or (info.name,))
        print(f"{names} is served on {url}/v1", flush=True)

    with _listen(host, port) as listener:
        url = _url(host, listener.getsockname()[1])
        if api_key is None and not _is_loopback(host):
            print(f"anybody who reaches {url} can use it; --api-key asks for a key", file=sys.stderr, flush=True)
        server = _Server(
            uvicorn.Config(
                create_app(client, settings, on_started),
                log_level=log_level,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=drain_seconds,
            )
        )
        server.run(sockets=[listener])
    if failure is not None:
        raise failure


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal that ended it cleanly is not raised again, so that the exit code is 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # a second Ctrl-C skips this; the engine process must end all the same
            await self.lifespan.shutdown()


def _check(port: int, api_key: str | None, names: Sequence[str], log_level: str) -> None:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; expected 0 to 65535")
    if api_key is not None and not api_key.strip():
        raise ConfigError("--api-key is empty; expected a key, or the option left out")
    if isinstance(names, str) or not all(names):
        raise ConfigError(f"--served-model-name is {names!r}; expected one name or more, none of them empty")
    if log_level not in LOG_LEVELS:
        raise ConfigError(f"--log-level is {log_level!r}; expected one of {', '.join(LOG_LEVELS)}")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
        # Accepted connections inherit it; without it a small answer waits for the last one's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {reason}") from None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
