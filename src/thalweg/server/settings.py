"""What the server is told, and the bounds it holds requests to."""

from __future__ import annotations

from dataclasses import dataclass, field

from thalweg.engine.sessions import SessionLimits
from thalweg.errors import ConfigError

MAX_CHOICES = 16  # n: continuations of one prompt
MAX_PROMPTS = 1024  # prompts in one request
MAX_MESSAGES = 4096
MAX_TOOLS = 512
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_QUEUED_REQUESTS = 2048  # by default; of sequences beyond those that run at once
MAX_HEADER_BYTES = 65_536  # a request's line and headers
KEEP_ALIVE_SECONDS = 120  # for the next request on a connection; proxies keep theirs for 60 to 90 s
PING_SECONDS = 15.0  # between comments in a stream that has nothing to say
LONG_TEXT = 16_384  # characters from which tokenisation leaves the event loop for a thread


@dataclass(frozen=True, slots=True)
class Cors:
    """Which other sites' pages may use the server from a browser: none, without `origins`.

    Raises ConfigError on what browsers would not follow, or nobody should want.
    """

    origins: tuple[str, ...] = ()  # "https://chat.example.com"; "*" is all
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False  # cookies and passwords that a browser sends by itself

    def __post_init__(self) -> None:
        for origin in self.origins:
            scheme, _, host = origin.partition("://")
            if origin != "*" and (not scheme or not host or set(host) & set("/*")):
                raise ConfigError(f"--allowed-origins has {origin!r}; expected SCHEME://HOST[:PORT], or *")
        if self.credentials and "*" in self.origins:
            raise ConfigError(
                "--allow-credentials is given and --allowed-origins is *: any site could use its visitors' passwords;"
                " expected origins by name"
            )
        if not self.origins and (self.methods, self.headers, self.credentials) != (("*",), ("*",), False):
            raise ConfigError("--allowed-methods, --allowed-headers and --allow-credentials need --allowed-origins")


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds on the answers of /v1/responses that are kept for previous_response_id: their number, their `bytes` in all
    with their conversations, and for how many seconds. A count of 0 keeps none. Raises ConfigError."""

    count: int = 1000
    bytes: int = 256 << 20
    seconds: float = 86_400.0

    def __post_init__(self) -> None:
        if not 0 <= self.count <= 1_000_000:
            raise ConfigError(f"--max-stored-responses is {self.count}; expected 0 to 1000000")
        if self.bytes < 1:
            raise ConfigError(f"--stored-responses-memory is {self.bytes} bytes; expected a size above 0")
        if not 0 < self.seconds <= 1e9:
            raise ConfigError(f"--stored-response-ttl is {self.seconds:g}; expected seconds above 0")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`served_model_names`: what the API calls the model, the first one in answers; empty: its folder's name.

    `tool_call_parser` and `reasoning_parser` name formats of server/parsers/formats.py; "auto" goes by the chat
    template. With `api_keys` every route but /health wants one of them. `max_queued_requests` sequences may wait
    beyond those that the engine runs at once. A body must have come within `body_seconds`; a stream with nothing to
    say sends a comment every `ping_seconds` (0: never). `stored` bounds what is kept of /v1/responses,
    `sessions` those of /v1/sessions. `expert_metrics`: whether /metrics counts the tokens of each expert.
    """

    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 10 << 20
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    body_seconds: float = 60.0
    max_queued_requests: int = MAX_QUEUED_REQUESTS
    ping_seconds: float = PING_SECONDS
    cors: Cors = Cors()
    stored: StoreLimits = StoreLimits()
    sessions: SessionLimits = field(default_factory=SessionLimits)
    expert_metrics: bool = False
