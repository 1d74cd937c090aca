"""Response bodies in OpenAI's shapes: msgspec structs, because streams encode one per token."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType, field
from starlette.responses import Response

from thalweg.tokenizer.base import valid_unicode

encode = msgspec.json.Encoder().encode


class PromptTokensDetails(Struct):
    cached_tokens: int  # that came from the prefix cache


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    """Tokens. A prompt counts once however many choices it has; the token that ended a choice counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int, reasoning: int | None = None) -> Usage:
        """`reasoning`: None where it cannot be told from the answer."""
        details = UNSET if reasoning is None else CompletionTokensDetails(reasoning)
        return cls(prompt, completion, prompt + completion, PromptTokensDetails(cached), details)


class FunctionCall(Struct, omit_defaults=True):
    name: str | None = None  # with the first piece of a streamed call only
    arguments: str | UnsetType = UNSET  # JSON, or a piece of it


class ToolCall(Struct, omit_defaults=True):
    function: FunctionCall
    index: int | None = None  # in streams
    id: str | None = None
    type: str | None = None


class ChatMessage(Struct):
    content: str | None
    role: str = "assistant"
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatDelta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Struct):
    """Parallel lists, one entry per token. The first token of an echoed prompt has neither logprob nor top ones."""

    text_offset: list[int] = field(default_factory=list)  # characters of the choice's text before the token
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # in streams, with the first piece only


class Envelope(Struct, kw_only=True):
    """What every chat and completion object begins with."""

    id: str
    object: str
    created: int  # seconds since 1970
    model: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET  # unset: not in the JSON at all
    prompt_token_ids: list[int] | UnsetType = UNSET  # of a chat; in streams, with the first chunk only


def new_id(prefix: str, between: str = "-") -> str:
    return f"{prefix}{between}{uuid.uuid4().hex}"


def sendable(value: Any) -> Any:
    """Plain data of a request in a form that can be sent back: texts that have a UTF-8 form, numbers within bounds."""
    if isinstance(value, str):
        return valid_unicode(value)
    if isinstance(value, dict):
        return {valid_unicode(key): sendable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [sendable(each) for each in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None if abs(value) >= 2**1023 else float(value)
    return value


def now() -> int:
    return int(time.time())


def json_response(body: Any) -> Response:
    return Response(encode(body), media_type="application/json")
