"""Request bodies. Types are strict and unknown fields are ignored; a field that is null has its default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from thalweg.core import MAX_STOP_STRINGS
from thalweg.server.errors import ApiError
from thalweg.server.settings import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_TOKEN_IDS,
)

MAX_INT = 2**31 - 1  # beyond any token id or count; what a message to the engine can hold

Count = Annotated[int, Field(ge=0, le=MAX_INT)]


def _expecting(what: str) -> WrapValidator:
    """One message for a field of several types, in place of one for each."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("expected", "expected {what}", {"what": what}) from None

    return WrapValidator(check)


# fail_fast: a body of a million wrong elements must not make a million errors.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Stop = Annotated[
    str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)],
    _expecting(f"a string or a list of at most {MAX_STOP_STRINGS} strings"),
]
Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    _expecting(f"a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"),
]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class GenerationBody(Body):
    """What chat and completions have in common. Ranges are core.SamplingParams's; only sizes are bounded here."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: int | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None


class TemplateOptions(BaseModel):
    """How the chat template lays out `messages`."""

    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments for the template. Its own names in chat_template_kwargs are refused with ApiError."""
        options = dict(self.chat_template_kwargs or {})
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in options:
                reason = f"chat_template_kwargs has {name!r}; expected variables of the template's own"
                raise ApiError(400, reason, param="chat_template_kwargs")
        return options | {"add_generation_prompt": self.add_generation_prompt is not False}


class ChatBody(GenerationBody, TemplateOptions):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionBody(GenerationBody):
    prompt: Prompt
    echo: bool | None = None
    logprobs: Count | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizeBody(Body, TemplateOptions):
    """One of the two: a text, or a conversation to be laid out by the chat template."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeBody(Body):
    tokens: TokenIds
