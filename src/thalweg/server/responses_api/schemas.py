"""Bodies of OpenAI's Responses API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from thalweg.server.schemas import MAX_INT, Budget, ChatBody, Count, DialectBody, Stop, StreamOptions, Tools, expecting
from thalweg.server.settings import MAX_MESSAGES
from thalweg.server.template_options import says

MAX_METADATA = 16

Input = Annotated[
    str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)],
    expecting(f"a string or a list of 1 to {MAX_MESSAGES} items"),
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
    expecting(f"at most {MAX_METADATA} strings of at most 512 characters by names of at most 64"),
]


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class Text(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesBody(DialectBody):
    FREE = ("max_tool_calls", "client_metadata")  # of tools that are not done here; of the client's own

    input: Input = says("a text, or items: messages, function_call, function_call_output, reasoning", required=True)
    instructions: str | None = says("what the model is told first; not kept for answers that continue from this one")
    previous_response_id: str | None = says("a stored answer, which this one continues")
    store: bool | None = says("keep the answer, for a while; true if not given")
    stream: bool | None = says("send pieces as server-sent events")
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = says("generated tokens at most")
    temperature: float | None = says("0 is greedy; at most 100")
    top_p: float | None = says("in (0, 1]")
    tools: Tools | None = says("functions that the model may call: type, name, description, parameters")
    tool_choice: Any = says("none, auto, required, or a function by name")
    parallel_tool_calls: bool | None = says("false: one call at most")
    text: Text | None = says("format: text, json_object, or json_schema with schema")
    reasoning: Reasoning | None = says("effort: reasoning_effort of chats; no summaries are made")
    include: list[str] | None = says("message.output_text.logprobs: log-probabilities of the text")
    top_logprobs: Count | None = says("and of so many most likely tokens")
    metadata: Metadata | None = says("given back with the answer")
    truncation: str | None = says("taken if it is disabled")
    background: bool | None = says("taken if it is false")
    conversation: Any = says("refused: no conversations are kept here")
    prompt: Any = says("refused: no prompts are kept here")
    user: str | None = says("given back with the answer")
    max_thinking_tokens: Budget | None = says("tokens of reasoning at most; -1: no limit")
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = says("0 or -1: off")
    min_p: float | None = says("in [0, 1]")
    seed: int | None = says("the same seed draws the same tokens")
    stop: Stop | None = says("texts that end the output, themselves left out")
    cache_salt: str | None = says("cached prefixes are shared only with requests of the same salt")
    chat_template_kwargs: dict[str, Any] | None = says("variables for the chat template")


ResponsesBody.ELSEWHERE = dict.fromkeys(
    ChatBody.model_fields.keys() - ResponsesBody.model_fields.keys(), "/v1/chat/completions"
)
