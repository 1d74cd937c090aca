"""Bodies of Anthropic's Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from thalweg.core import MAX_STOP_STRINGS
from thalweg.server.schemas import MAX_INT, Budget, ChatBody, DialectBody, Messages, Tools, expecting
from thalweg.server.template_options import says

System = Annotated[
    str | Annotated[list[dict[str, Any]], Field(max_length=1024, fail_fast=True)],
    expecting("a string or a list of text blocks"),
]


class Thinking(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    display: Literal["summarized", "omitted"] | None = None
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None


class ToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: str | None = None
    format: dict[str, Any] | None = None


class CountBody(DialectBody):
    """What makes up a prompt."""

    FREE = ("container", "context_management", "inference_geo", "betas")  # they say nothing where nothing is kept

    messages: Messages = says("the conversation: objects with role and content, a text or blocks", required=True)
    system: System | None = says("what the model is told first")
    tools: Tools | None = says("functions that the model may call: name, description, input_schema")
    tool_choice: ToolChoice | None = says("type: auto, any, tool (with name) or none")
    thinking: Thinking | None = says(
        "type: enabled, adaptive or disabled; budget_tokens: tokens of reasoning at most; display: omitted leaves its"
        " text out"
    )
    output_config: OutputConfig | None = says("format: a JSON schema for the text; effort: reasoning_effort")
    output_format: dict[str, Any] | None = says("the older name of output_config.format")
    mcp_servers: list[Any] | None = says("refused if it has any: no server is asked from here")
    chat_template_kwargs: dict[str, Any] | None = says("variables for the chat template")


class MessagesBody(CountBody):
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] = says("generated tokens at most", required=True)
    stream: bool | None = says("send pieces as server-sent events")
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = says("texts that end the output")
    temperature: float | None = says("0 is greedy; at most 100")
    top_p: float | None = says("in (0, 1]")
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = says("0 or -1: off")
    min_p: float | None = says("in [0, 1]")
    seed: int | None = says("the same seed draws the same tokens")
    cache_salt: str | None = says("cached prefixes are shared only with requests of the same salt")
    max_thinking_tokens: Budget | None = says("thinking.budget_tokens, as this server's chats have it")


CountBody.ELSEWHERE = dict.fromkeys(
    ChatBody.model_fields.keys() - MessagesBody.model_fields.keys(), "/v1/chat/completions"
)
