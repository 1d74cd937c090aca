"""`serve`: an engine and an HTTP server until a signal ends them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import uvicorn

from thalweg.config.engine import EngineConfig
from thalweg.config.streams import say
from thalweg.engine.processes.client import EngineClient, RequestLimits
from thalweg.engine.processes.profiler import ProfilerOptions
from thalweg.engine.sessions import SessionLimits
from thalweg.errors import ConfigError
from thalweg.server.app import create_app
from thalweg.server.connections import listen, raise_file_limit
from thalweg.server.manners import log_config
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.protocol import PromptProtocol
from thalweg.server.settings import (
    KEEP_ALIVE_SECONDS,
    MAX_QUEUED_REQUESTS,
    PING_SECONDS,
    Cors,
    ServerSettings,
    StoreLimits,
)

MAX_QUEUED = 1_000_000
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
SHUTDOWN_SECONDS = 30.0
SWITCH_SECONDS = 0.001  # how long a thread with a long text may keep the event loop waiting, at a time
_LAST_WORDS_SECONDS = 5  # for the answers of requests that were ended, before connections are cut
_DEAD_SECONDS = 2.0  # from the engine's death to the server's: what asks meanwhile hears of it, probes too


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | Sequence[str] | None = None,
    served_model_name: Sequence[str] = (),
    log_level: str = "warning",
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    max_queued_requests: int = MAX_QUEUED_REQUESTS,
    queue_timeout: float | None = None,
    request_timeout: float | None = None,
    shutdown_timeout: float = SHUTDOWN_SECONDS,
    keep_alive_timeout: int = KEEP_ALIVE_SECONDS,
    sse_ping_interval: float = PING_SECONDS,
    cors: Cors | None = None,
    stored: StoreLimits | None = None,
    sessions: SessionLimits | None = None,
    profiler: ProfilerOptions | None = None,
    expert_metrics: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then let requests under way finish for up to `shutdown_timeout` seconds, end the
    others with an error, and return.

    `queue_timeout` and `request_timeout` are the seconds a request may wait for its slot and take in all; more than
    `max_queued_requests` waiting sequences are refused. A connection may be idle for `keep_alive_timeout` seconds; a
    stream with nothing to say sends a comment every `sse_ping_interval` seconds (0: never). `profiler` lets clients
    record traces; `expert_metrics` has /metrics count the tokens of each expert; `stored` bounds what is kept of
    answers of /v1/responses, `sessions` those of /v1/sessions. Clients must send `api_key`, or one of several. Port 0
    takes a free one. Where it listens is printed once requests can be served; "info" logs each request.

    Raises ConfigError for an option that cannot be honoured, whatever kept the engine from starting, and
    EngineDeadError if the engine died later, once its requests were told.
    """
    api_keys = () if api_key is None else (api_key,) if isinstance(api_key, str) else tuple(api_key)
    _check(port, api_keys, served_model_name, log_level)
    _check_limits(max_queued_requests, queue_timeout, request_timeout, shutdown_timeout)
    _check_idle(keep_alive_timeout, sse_ping_interval)
    if profiler is not None and not config.one_host:
        raise ConfigError("--enable-profiler needs all ranks on one host; expected neither --nnodes nor Ray with it")
    config = replace(config, expert_metrics=expert_metrics)
    raise_file_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    debug = log_level == "debug"
    client = EngineClient(config, RequestLimits(queue_timeout, request_timeout), profiler, debug)
    output = OutputFormat.of(client.codec, tool_call_parser, reasoning_parser)  # refuses a name early
    settings = ServerSettings(
        served_model_names=tuple(served_model_name),
        api_keys=api_keys,
        max_queued_requests=max_queued_requests,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        ping_seconds=sse_ping_interval,
        cors=cors or Cors(),
        stored=stored or StoreLimits(),
        sessions=sessions or SessionLimits(),
        expert_metrics=expert_metrics,
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
            *([] if info.experts is None else [f"experts         {info.experts}"]),
            *info.memory_split,
            f"decode steps    {info.decode_steps}",
            f"prefill steps   {info.prefill_steps}",
            f"chat answers    {output.describe()}",
            f"sampling        {client.codec.source.generation.describe()}",
        )
        say(*summary, error=True)
        names = ", ".join(settings.served_model_names or (info.name,))
        say(f"{names} is served on {url}/v1")

    with listen(host, port) as listener:
        url = _url(host, listener.getsockname()[1])
        if not api_keys and not _is_loopback(host):
            say(f"anybody who reaches {url} can use it; --api-key asks for a key", error=True)
        server = _Server(
            uvicorn.Config(
                create_app(client, settings, on_started),
                log_level=log_level,
                log_config=log_config(log_level),
                http=PromptProtocol,
                timeout_keep_alive=keep_alive_timeout,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=math.ceil(shutdown_timeout) + _LAST_WORDS_SECONDS,
            ),
            client,
            shutdown_timeout,
        )
        server.run(sockets=[listener])
    if (error := failure or client.died) is not None:
        raise error


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal that ended it cleanly is not raised again, so that the exit code is 0, what has
    not ended in time is told so before its connection is cut, and it ends when the engine is dead."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, shutdown_timeout: float) -> None:
        super().__init__(config)
        self._client, self._shutdown_timeout = client, shutdown_timeout
        self._ticks_dead = 0

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._client.died is not None:
            self._ticks_dead += 1
            if self._ticks_dead > 10 * _DEAD_SECONDS:
                self.should_exit = True
        return await super().on_tick(counter)

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
        if self._client.died is not None:  # nothing is left to wait for but readers of last events
            self.config.timeout_graceful_shutdown = _LAST_WORDS_SECONDS
        reason = f"the server shuts down; the request had not ended after {self._shutdown_timeout:g} s"
        end = asyncio.get_running_loop().call_later(self._shutdown_timeout, self._client.end_requests, reason)
        await super().shutdown(sockets)
        end.cancel()
        if self.force_exit:  # a second Ctrl-C skips this; the engine process must end all the same
            await self.lifespan.shutdown()


def _check(port: int, api_keys: Sequence[str], names: Sequence[str], log_level: str) -> None:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; expected 0 to 65535")
    # No header can bring another key as it is, so that nobody could send it. (The key itself is not printed.)
    if not all(key == key.strip() != "" and key.isprintable() for key in api_keys):
        raise ConfigError(
            "--api-key (or THALWEG_API_KEY) is empty, begins or ends with white space or has control characters;"
            " expected a key, or the option left out"
        )
    if isinstance(names, str) or not all(names):
        raise ConfigError(f"--served-model-name is {names!r}; expected one name or more, none of them empty")
    if log_level not in LOG_LEVELS:
        raise ConfigError(f"--log-level is {log_level!r}; expected one of {', '.join(LOG_LEVELS)}")


def _check_limits(queued: int, queue: float | None, request: float | None, shutdown: float) -> None:
    if not 0 <= queued <= MAX_QUEUED:
        raise ConfigError(f"--max-queued-requests is {queued}; expected 0 to {MAX_QUEUED}")
    for option, seconds in (("queue", queue), ("request", request)):
        if seconds is not None and not 0 < seconds <= 1e6:
            raise ConfigError(f"--{option}-timeout is {seconds}; expected seconds above 0")
    if not 0 <= shutdown <= 1e6:
        raise ConfigError(f"--shutdown-timeout is {shutdown}; expected seconds, 0 or more")


def _check_idle(keep_alive: int, ping: float) -> None:
    if not 1 <= keep_alive <= 86_400:
        raise ConfigError(f"--keep-alive-timeout is {keep_alive}; expected 1 to 86400 seconds")
    if not (ping == 0 or 0.1 <= ping <= 1e6):
        raise ConfigError(f"--sse-ping-interval is {ping}; expected seconds, 0.1 or more, or 0 for none")


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
