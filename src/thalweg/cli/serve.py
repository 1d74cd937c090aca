"""`thalweg serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from thalweg.cli.options import engine_config, takes
from thalweg.config import env
from thalweg.config.engine import EngineConfig
from thalweg.server.settings import MAX_QUEUED_REQUESTS


def _limit(**options: Any) -> Any:
    return typer.Option(rich_help_panel="Limits", **options)


@takes(config=engine_config)
def serve(
    config: EngineConfig,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Key that clients must send; THALWEG_API_KEY if left out, else none."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name of the model in requests; its folder's if left out. May be repeated."),
    ] = None,
    tool_call_parser: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="How the model writes tool calls: kimi_k2, hermes, qwen3_coder or none; auto: by the template.",
        ),
    ] = "auto",
    reasoning_parser: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="How the model marks reasoning: think or none; auto: by the template."),
    ] = "auto",
    max_queued_requests: Annotated[
        int, _limit(metavar="N", help="Sequences that may wait beyond --max-num-seqs; more are refused with 429.")
    ] = MAX_QUEUED_REQUESTS,
    queue_timeout: Annotated[
        float | None, _limit(metavar="SECONDS", help="A request that waits longer for its slot is refused with 503.")
    ] = None,
    request_timeout: Annotated[
        float | None, _limit(metavar="SECONDS", help="A request that takes longer in all ends with 504.")
    ] = None,
    shutdown_timeout: Annotated[
        float, _limit(metavar="SECONDS", help="After SIGTERM or SIGINT, how long requests under way may finish.")
    ] = 30.0,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="error, warning, info (each request) or debug; THALWEG_LOG_LEVEL if left out, else warning.",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics."""
    from thalweg.server.run import serve as run

    run(
        config,
        host=host,
        port=port,
        api_key=env.read("THALWEG_API_KEY") if api_key is None else api_key,
        served_model_name=served_model_name or (),
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        max_queued_requests=max_queued_requests,
        queue_timeout=queue_timeout,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        log_level=log_level or env.read("THALWEG_LOG_LEVEL") or "warning",
    )
