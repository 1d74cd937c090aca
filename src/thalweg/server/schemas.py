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
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


def _says(description: str, *, required: bool = False) -> Any:
    return Field(description=description) if required else Field(None, description=description)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = _says("a name that /v1/models gives; the one served if not given")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class GenerationBody(Body):
    """What chat and completions have in common. Ranges are core.SamplingParams's; only sizes are bounded here."""

    stream: bool | None = _says("send pieces as server-sent events, [DONE] at the end")
    stream_options: StreamOptions | None = _says("include_usage: a last piece with the token counts")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = _says("choices of an answer")
    max_tokens: Count | None = _says("generated tokens at most")
    min_tokens: Count | None = _says("before as many tokens no token ends the text; stop does")
    temperature: float | None = _says("0 is greedy; at most 100")
    top_p: float | None = _says("in (0, 1]")
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = _says("0 or -1: off")
    min_p: float | None = _says("in [0, 1]")
    repetition_penalty: float | None = _says("over prompt and output; 1 is off")
    presence_penalty: float | None = _says("over the output, in [-2, 2]")
    frequency_penalty: float | None = _says("over the output, in [-2, 2]")
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = _says(
        "token id to a bias in [-100, 100]"
    )
    seed: int | None = _says("the same seed draws the same tokens; choice i has seed + i")
    stop: Stop | None = _says("texts that end the output, themselves left out")
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = _says(
        "tokens that end the output"
    )
    ignore_eos: bool | None = _says("go on after an end-of-sequence token")
    include_stop_str_in_output: bool | None = _says("leave what stopped it in the text")
    skip_special_tokens: bool | None = _says("leave control tokens out of the text; true if not given")
    response_format: dict[str, Any] | None = _says(
        'what the text must be: {"type": "json_object"}, or "json_schema" with {"json_schema": {"schema": ...}}'
    )
    structured_outputs: dict[str, Any] | None = _says(
        "the same by one of: json (a schema), regex, choice (a list of texts), grammar (Lark)"
    )


class TemplateOptions(BaseModel):
    """How the chat template lays out `messages`."""

    add_generation_prompt: bool | None = _says("begin the assistant's turn; true if not given")
    chat_template_kwargs: dict[str, Any] | None = _says("variables for the chat template")

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments for the template. Its own names in chat_template_kwargs are refused with ApiError."""
        options = dict(self.chat_template_kwargs or {})
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in options:
                reason = f"chat_template_kwargs has {name!r}; expected variables of the template's own"
                raise ApiError(400, reason, param="chat_template_kwargs")
        return options | {"add_generation_prompt": self.add_generation_prompt is not False}


class ChatBody(GenerationBody, TemplateOptions):
    messages: Messages = _says("the conversation: objects with role and content", required=True)
    max_completion_tokens: Count | None = _says("the newer name of max_tokens")
    logprobs: bool | None = _says("give the log-probability of each token")
    top_logprobs: Count | None = _says("and of so many most likely ones")
    tools: Tools | None = _says("functions that the model may call")
    tool_choice: Any = _says("none, auto, required, or a function by name")
    parallel_tool_calls: bool | None = _says("false: one call at most")


class CompletionBody(GenerationBody):
    prompt: Prompt = _says("a text, token ids, or a list of either", required=True)
    echo: bool | None = _says("begin the text with the prompt")
    logprobs: Count | None = _says("give log-probabilities, of so many likely tokens too; with echo, the prompt's")
    best_of: int | None = _says("taken where it equals n")
    suffix: str | None = _says("not supported")


class TokenizeBody(Body, TemplateOptions):
    """One of the two: a text, or a conversation to be laid out by the chat template."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = _says("functions, as in a chat request")


class DetokenizeBody(Body):
    tokens: TokenIds
