"""Request bodies. Types are strict; null is the default of a field; dialects.py has fields that are not supported."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from thalweg.core import MAX_STOP_STRINGS
from thalweg.engine.sessions import MAX_FORKS
from thalweg.server import dialects
from thalweg.server.errors import ApiError
from thalweg.server.settings import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_TOKEN_IDS,
)
from thalweg.server.template_options import TemplateOptions, says

MAX_INT = 2**31 - 1  # beyond any token id or count; what a message to the engine can hold

Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Budget = Annotated[int, Field(ge=-1, le=MAX_INT)]  # -1: no limit


def expecting(what: str) -> WrapValidator:
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
    expecting(f"a string or a list of at most {MAX_STOP_STRINGS} strings"),
]
Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    expecting(f"a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"),
]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Schema = Annotated[dict[str, Any] | str, expecting("a JSON schema")]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = says("a name of /v1/models; by default the model that is served")


class DialectBody(Body):
    """A request that clients of other servers send too, with fields of those (dialects.py)."""

    ELSEWHERE: ClassVar[dict[str, str]] = {}  # fields of other requests, and the route that has them
    FREE: ClassVar[tuple[str, ...]] = ()  # fields that say nothing here

    @model_validator(mode="before")
    @classmethod
    def _check_dialect(cls, body: Any) -> Any:
        if isinstance(body, dict):
            dialects.check(body, {*cls.model_fields, *cls.FREE}, cls.ELSEWHERE)
        return body


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class Grammars(BaseModel):
    """What the text must be, in every dialect; one of them at most (structured.py)."""

    response_format: dict[str, Any] | None = says(
        'what the text must be: {"type": "json_object"}, or "json_schema" with {"json_schema": {"schema": ...}}'
    )
    structured_outputs: dict[str, Any] | None = says(
        "the same by one of: json (a schema), regex, choice (a list of texts), grammar (Lark or GBNF), json_object"
    )
    guided_json: Schema | None = says("structured_outputs.json, in vLLM's older form")
    guided_regex: str | None = says("structured_outputs.regex, in vLLM's older form")
    guided_choice: list[str] | None = says("structured_outputs.choice, in vLLM's older form")
    guided_grammar: str | None = says("structured_outputs.grammar, in vLLM's older form")
    json_schema: Schema | None = says("structured_outputs.json, as llama.cpp and SGLang have it")
    regex: str | None = says("structured_outputs.regex, as SGLang has it")
    ebnf: str | None = says("structured_outputs.grammar, as SGLang has it")
    grammar: str | None = says("structured_outputs.grammar, as llama.cpp has it")


class Synonyms(BaseModel):
    """Fields of ours by the names that they have elsewhere."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "n_predict": "max_tokens",
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "repeat_penalty": "repetition_penalty",
        "stop_sequences": "stop",
        "no_stop_trim": "include_stop_str_in_output",
        "sampling_seed": "seed",
        "random_seed": "seed",
        "truncate": "truncate_prompt_tokens",
    }

    n_predict: Annotated[int, Field(ge=-2, le=MAX_INT)] | None = says(
        "llama.cpp's max_tokens; -1 and -2 are as many as the context has room for"
    )
    max_new_tokens: Count | None = says("max_tokens, as TGI has it")
    min_new_tokens: Count | None = says("min_tokens, as SGLang has it")
    repeat_penalty: float | None = says("repetition_penalty, as llama.cpp has it")
    stop_sequences: Stop | None = says("stop, as TGI has it")
    no_stop_trim: bool | None = says("include_stop_str_in_output, as SGLang has it")
    sampling_seed: int | None = says("seed, as SGLang has it")
    random_seed: int | None = says("seed, as Mistral has it")
    truncate: Annotated[int, Field(ge=1, le=MAX_INT)] | None = says("truncate_prompt_tokens, as TGI has it")

    def spelled(self) -> dict[str, str]:
        """{name of ours: the one that the request has for it}"""
        return {ours: name for name, ours in self.SYNONYMS.items() if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _take_synonyms(self) -> Self:
        for name, ours in self.SYNONYMS.items():
            value, other = getattr(self, name), getattr(self, ours)
            if value is None or (name == "n_predict" and value < 0 and other is None):
                continue
            if other is not None and other != value:
                raise ApiError(400, f"{name} and {ours} are both given; expected one of them", param=name)
            setattr(self, ours, value)
        return self


class GenerationBody(DialectBody, Grammars, Synonyms):
    """What chat and completions have in common. Ranges are core.SamplingParams's; only sizes are bounded here."""

    stream: bool | None = says("send the answer in pieces, as server-sent events with [DONE] at the end")
    stream_options: StreamOptions | None = says("include_usage: a last piece with the token counts")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = says("number of choices")
    max_tokens: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = says(
        "most tokens to generate; -1 is as many as the context has room for"
    )
    max_completion_tokens: Count | None = says("the newer name of max_tokens")
    min_tokens: Count | None = says("until there are so many tokens, no token ends the text; stop strings do")
    temperature: float | None = says("0 is greedy; at most 100")
    top_p: float | None = says("in (0, 1]")
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = says("0 or -1: off")
    min_p: float | None = says("in [0, 1]")
    repetition_penalty: float | None = says("over prompt and output; 1 is off")
    presence_penalty: float | None = says("over the output, in [-2, 2]")
    frequency_penalty: float | None = says("over the output, in [-2, 2]")
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = says(
        "token id to a bias in [-100, 100]"
    )
    seed: int | None = says("the same seed draws the same tokens; choice i has seed + i")
    stop: Stop | None = says("texts that end the output and are left out of it")
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = says(
        "tokens that end the output"
    )
    ignore_eos: bool | None = says("continue after an end-of-sequence token")
    include_stop_str_in_output: bool | None = says("keep the stop string in the text")
    return_token_ids: bool | None = says("give token_ids with each choice, and prompt_token_ids once")
    cache_salt: str | None = says("cached prefixes are shared only with requests that have the same salt")
    skip_special_tokens: bool | None = says("leave control tokens out of the text; true by default")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = says(
        "keep so many of the prompt's last tokens; -1: as many as leave room for max_tokens"
    )
    add_special_tokens: bool | None = says("true is accepted if the tokenizer adds no tokens to a text")
    best_of: int | None = says("accepted if it equals n")
    repeat_last_n: int | None = says("accepted if it is -1, all of the text, or if no penalty is asked for")
    penalize_nl: bool | None = says("accepted if it is true, or if no penalty is asked for")

    def limit(self, default: int | None) -> int | None:
        """How many tokens may be generated; None: as many as the context has room for."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        if self.max_tokens is not None:
            return None if self.max_tokens < 0 else self.max_tokens
        return default if self.n_predict is None else None


class ThinkingBudget(BaseModel):
    """How long a chat's reasoning may be, as this server and others call it."""

    SYNONYMS: ClassVar[dict[str, str]] = Synonyms.SYNONYMS | dict.fromkeys(
        ("thinking_token_budget", "thinking_budget", "thinking_budget_tokens", "reasoning_budget"),
        "max_thinking_tokens",
    )

    max_thinking_tokens: Budget | None = says("most tokens of reasoning, which is then closed; -1 is no limit")
    thinking_token_budget: Budget | None = says("max_thinking_tokens, as vLLM has it")
    thinking_budget: Budget | None = says("max_thinking_tokens, as Qwen has it")
    thinking_budget_tokens: Budget | None = says("max_thinking_tokens, as llama.cpp has it")
    reasoning_budget: Budget | None = says("max_thinking_tokens, as llama.cpp's command line has it")


class ChatBody(ThinkingBudget, GenerationBody, TemplateOptions):
    messages: Messages = says("the conversation: objects with role and content", required=True)
    logprobs: bool | None = says("give the log-probability of each token")
    top_logprobs: Count | None = says("also give those of so many most likely tokens")
    tools: Tools | None = says("functions that the model may call")
    tool_choice: Any = says("none, auto, required, or a function by name")
    parallel_tool_calls: bool | None = says("false allows at most one call")
    functions: Tools | None = says("OpenAI's older tools; calls come back as function_call")
    function_call: Any = says('none, auto, or {"name": ...}: the tool_choice of functions')


class CompletionBody(GenerationBody):
    prompt: Prompt = says("a text, token ids, or a list of either", required=True)
    echo: bool | None = says("begin the text with the prompt")
    logprobs: Count | None = says(
        "give log-probabilities, also of so many most likely tokens; with echo, the prompt's too"
    )
    suffix: str | None = says("accepted if it is empty")
    session: str | None = says("a session of /v1/sessions, which the prompt continues")
    session_save: bool | None = says("add prompt and answer to the session as a new point")


# What else the other kind has says nothing here.
CompletionBody.ELSEWHERE = dict.fromkeys(
    ChatBody.model_fields.keys()
    - CompletionBody.model_fields.keys()
    - {"add_generation_prompt", "parallel_tool_calls", "reasoning_effort"},
    "/v1/chat/completions",
)
ChatBody.ELSEWHERE = dict.fromkeys(CompletionBody.model_fields.keys() - ChatBody.model_fields.keys(), "/v1/completions")


class SessionBody(Body):
    """A new session: of a prompt, or what another one is."""

    name: str = says("1 to 128 letters, digits or any of . _ : / -", required=True)
    prompt: Annotated[str | TokenIds, expecting("a string or a list of token ids")] | None = says(
        "a text or token ids to compute"
    )
    ttl: float | None = says("seconds that it is kept after its last use, at most --session-ttl")
    cache_salt: str | None = says("as in requests; only the same salt finds the session")


class SessionPromptBody(Body):
    prompt: Annotated[str | TokenIds, expecting("a string or a list of token ids")] = says(
        "a text or token ids to add, which are computed", required=True
    )
    cache_salt: str | None = says("the session's")


class ForkBody(Body):
    names: Annotated[list[str], Field(min_length=1, max_length=MAX_FORKS, fail_fast=True)] = says(
        "names of the new sessions, which are equal to this one", required=True
    )
    cache_salt: str | None = says("the session's")


class RollBackBody(Body):
    point: int = says(
        "index of the point that becomes the last one; negative indices count from the end", required=True
    )
    cache_salt: str | None = says("the session's")


class TokenizeBody(DialectBody, TemplateOptions):
    """One of the two: a text, or a conversation to be laid out by the chat template."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = says("functions, as in a chat request")
    add_special_tokens: bool | None = says("true is accepted if the tokenizer adds no tokens to a text")
    return_token_strs: bool | None = says("also give the text of each token, as token_strs")


class DetokenizeBody(Body):
    tokens: TokenIds
