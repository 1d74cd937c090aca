"""`thalweg serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from thalweg.cli.options import engine_config, takes
from thalweg.cli.torchrun import under_torchrun
from thalweg.config import env
from thalweg.config.engine import EngineConfig, parse_size
from thalweg.engine.processes.profiler import ProfilerOptions
from thalweg.engine.sessions import SessionLimits
from thalweg.errors import ConfigError
from thalweg.server.settings import KEEP_ALIVE_SECONDS, MAX_QUEUED_REQUESTS, PING_SECONDS, Cors, StoreLimits

_STORED = StoreLimits()
_SESSIONS = SessionLimits()


def _limit(**options: Any) -> Any:
    return typer.Option(rich_help_panel="Limits", **options)


def _profiler(**options: Any) -> Any:
    return typer.Option(rich_help_panel="Profiler", **options)


def _stored(**options: Any) -> Any:
    return typer.Option(rich_help_panel="Stored answers of /v1/responses", **options)


def _sessions(**options: Any) -> Any:
    return typer.Option(rich_help_panel="Sessions", **options)


def _cors(**options: Any) -> Any:
    return typer.Option(rich_help_panel="Pages of other sites (CORS); options may be repeated", **options)


@takes(config=engine_config)
def serve(
    config: EngineConfig,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all addresses.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on; 0 takes a free port.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Key that clients must send. Default: THALWEG_API_KEY, or no key. May be repeated."
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Name of the model in requests. Default: the folder's name. May be repeated."
        ),
    ] = None,
    tool_call_parser: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="How the model writes tool calls: kimi_k2, hermes, qwen3_coder or none; auto asks the template.",
        ),
    ] = "auto",
    reasoning_parser: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="How the model marks reasoning: think or none; auto asks the template."),
    ] = "auto",
    max_queued_requests: Annotated[
        int, _limit(metavar="N", help="Most sequences that wait while --max-num-seqs run; more get a 429.")
    ] = MAX_QUEUED_REQUESTS,
    queue_timeout: Annotated[
        float | None,
        _limit(metavar="SECONDS", help="A request that waits longer for a slot gets a 503. Default: no limit."),
    ] = None,
    request_timeout: Annotated[
        float | None,
        _limit(metavar="SECONDS", help="A request that takes longer in all gets a 504. Default: no limit."),
    ] = None,
    shutdown_timeout: Annotated[
        float, _limit(metavar="SECONDS", help="How long requests under way may take to finish after SIGTERM or SIGINT.")
    ] = 30.0,
    keep_alive_timeout: Annotated[
        int, _limit(metavar="SECONDS", help="How long a connection may be idle. Make it longer than a proxy's.")
    ] = KEEP_ALIVE_SECONDS,
    sse_ping_interval: Annotated[
        float, _limit(metavar="SECONDS", help="How often a stream without news sends a comment; 0 is never.")
    ] = PING_SECONDS,
    allowed_origins: Annotated[
        list[str] | None,
        _cors(
            metavar="ORIGIN", help="Site whose pages may use the server, as https://HOST, or * for all. Default: none."
        ),
    ] = None,
    allowed_methods: Annotated[
        list[str] | None, _cors(metavar="METHOD", help="Method that such pages may use. Default: all.")
    ] = None,
    allowed_headers: Annotated[
        list[str] | None, _cors(metavar="HEADER", help="Header that such pages may send. Default: all.")
    ] = None,
    allow_credentials: Annotated[
        bool, _cors(help="Let browsers send stored passwords from such pages; not with *.")
    ] = False,
    max_stored_responses: Annotated[
        int, _stored(metavar="N", help="Most answers that are kept for previous_response_id; 0 is none.")
    ] = _STORED.count,
    stored_responses_memory: Annotated[
        str, _stored(metavar="SIZE", help="Most memory of kept answers; the oldest are forgotten first.")
    ] = "256MiB",
    stored_response_ttl: Annotated[
        float, _stored(metavar="SECONDS", help="How long an answer is kept.")
    ] = _STORED.seconds,
    max_sessions: Annotated[
        int, _sessions(metavar="N", help="Most sessions of /v1/sessions; 0 is none.")
    ] = _SESSIONS.count,
    session_ttl: Annotated[
        float, _sessions(metavar="SECONDS", help="The longest time that a session is kept after its last use.")
    ] = _SESSIONS.seconds,
    enable_profiler: Annotated[
        str | None,
        _profiler(
            metavar="DIR", help="Let clients record traces into this folder: POST /start_profile, /stop_profile."
        ),
    ] = None,
    profiler_max_steps: Annotated[
        int, _profiler(metavar="N", min=1, max=100_000, help="Most steps of one trace.")
    ] = 1000,
    profiler_max_bytes: Annotated[
        str, _profiler(metavar="SIZE", help="Most memory of a trace on a rank, which is about its size unpacked.")
    ] = "256MiB",
    expert_metrics: Annotated[
        bool,
        typer.Option(
            "--expert-metrics",
            help="Have /metrics count the tokens of each expert; with --data-parallel-size only, and no CUDA graphs.",
        ),
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="error, warning, info (logs each request) or debug. Default: THALWEG_LOG_LEVEL, or warning.",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /metrics."""
    config = under_torchrun(config)
    if config.node_rank:
        from thalweg.engine.processes.host_main import serve_ranks

        serve_ranks(replace(config, expert_metrics=expert_metrics), shutdown_timeout)
        return
    from thalweg.server.run import serve as run

    run(
        config,
        host=host,
        port=port,
        api_key=api_key or env.read("THALWEG_API_KEY"),
        served_model_name=served_model_name or (),
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        max_queued_requests=max_queued_requests,
        queue_timeout=queue_timeout,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        keep_alive_timeout=keep_alive_timeout,
        sse_ping_interval=sse_ping_interval,
        cors=Cors(
            _listed("--allowed-origins", allowed_origins, ()),
            _listed("--allowed-methods", allowed_methods, ("*",)),
            _listed("--allowed-headers", allowed_headers, ("*",)),
            allow_credentials,
        ),
        stored=StoreLimits(
            max_stored_responses,
            parse_size(stored_responses_memory, "--stored-responses-memory"),
            stored_response_ttl,
        ),
        sessions=SessionLimits(count=max_sessions, seconds=session_ttl),
        profiler=_profiler_options(enable_profiler, profiler_max_steps, profiler_max_bytes),
        expert_metrics=expert_metrics,
        log_level=log_level or env.read("THALWEG_LOG_LEVEL") or "warning",
    )


def _profiler_options(folder: str | None, max_steps: int, max_bytes: str) -> ProfilerOptions | None:
    """Makes the folder, in one that exists. Raises ConfigError."""
    size = parse_size(max_bytes, "--profiler-max-bytes")
    if size < 1:
        raise ConfigError(f"--profiler-max-bytes is {max_bytes!r}; expected a size above 0")
    if folder is None:
        return None
    path = Path(folder).expanduser().resolve()
    try:
        path.mkdir(exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        reason = f"which cannot be made or written: {e.strerror}"
        raise ConfigError(f"--enable-profiler is {folder!r}, {reason}; expected a folder") from None
    return ProfilerOptions(str(path), max_steps, size)


def _listed(option: str, values: list[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Each value of an option is a name, names with commas between them, or a JSON list, as elsewhere."""
    if values is None:
        return default
    names: list[str] = []
    for value in values:
        if value.lstrip().startswith("["):
            try:
                names += msgspec.json.decode(value, type=list[str])
            except msgspec.DecodeError as e:
                raise ConfigError(f"{option} is {value!r}; expected a JSON list of strings ({e})") from None
        else:
            names += [name.strip() for name in value.split(",")]
    return tuple(name for name in names if name)
