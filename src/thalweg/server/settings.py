"""What the server is told, and the bounds it holds requests to."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHOICES = 16  # n: continuations of one prompt
MAX_PROMPTS = 1024  # prompts in one request
MAX_MESSAGES = 4096
MAX_TOOLS = 512
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_QUEUED_REQUESTS = 2048  # by default; of sequences beyond those that run at once
MAX_HEADER_BYTES = 65_536  # a request's line and headers
LONG_TEXT = 16_384  # characters from which tokenisation leaves the event loop for a thread


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`served_model_names`: what the API calls the model, the first one in answers; empty: its folder's name.

    `tool_call_parser` and `reasoning_parser` name formats of server/parsers/formats.py; "auto" goes by the chat
    template. With `api_key` every route but /health wants `Authorization: Bearer KEY`. `max_queued_requests` sequences
    may wait beyond those that the engine runs at once. A body must have come within `body_seconds`.
    """

    served_model_names: tuple[str, ...] = ()
    api_key: str | None = None
    max_body_bytes: int = 10 << 20
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    body_seconds: float = 60.0
    max_queued_requests: int = MAX_QUEUED_REQUESTS
