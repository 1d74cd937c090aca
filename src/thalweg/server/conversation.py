"""One generation for a conversation, which each API's answer is made of: prompt, tools, grammar, limits, sequences."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from thalweg.core import SamplingParams
from thalweg.server.errors import ApiError, as_api_error
from thalweg.server.functions import as_tools, in_older_words
from thalweg.server.generation import News, generate, jobs_of, naming_fields
from thalweg.server.params import refuse_unsupported, sampling_params, thinking_limit, truncated
from thalweg.server.parsers.events import CallBegin, Content, Event, Reasoning
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.schemas import ChatBody
from thalweg.server.service import Service, maybe_in_thread
from thalweg.server.spelling import CHATS, Spelling
from thalweg.server.structured import held_to, wanted
from thalweg.server.tools import ToolUse, tool_use
from thalweg.text.output import Delta


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat that the engine is about to answer. `news` has to be closed; `taken` is set once nothing of the request
    can be wrong any more."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    use: ToolUse
    news: News
    taken: asyncio.Event


async def translated(size: int, fields: Callable[[], Mapping[str, Any]], spelling: Spelling) -> ChatBody:
    """A request of another API in the form of a chat's, of the `fields` that are made of its `size` bytes, which count
    what it continues from. Raises ApiError."""

    def chat() -> ChatBody:
        made = fields()  # whose errors are in the request's words
        with spelling.applied():
            return _chat_body(made)

    return await maybe_in_thread(size, chat)


def _chat_body(fields: Mapping[str, Any]) -> ChatBody:
    try:
        return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        wrong = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise as_api_error(RequestValidationError(wrong)) from None


async def encode_prompt(body: ChatBody, size: int, service: Service) -> tuple[list[int], ToolUse]:
    """The prompt's ids as the chat template has them, and what the model may do with tools."""
    use = _tool_use(body, service)
    ids = await service.encode_chat(size, body.messages, tools=use.tools or None, **body.template_options())
    return ids, use


async def converse(
    body: ChatBody, size: int, service: Service, response_id: str, spelling: Spelling = CHATS
) -> Conversation:
    """Check a request of `size` bytes and make of it what the engine needs; nothing runs before `news` is read.

    Raises ApiError or InvalidRequest, whose fields are those of the request as `spelling` says.
    """
    arrived = time.perf_counter()
    with spelling.applied():
        service.check(body.model)
        refuse_unsupported(body, service.client.codec.tokenizer)
        text = await wanted(body)
        max_tokens = body.limit(service.suggested.get("max_tokens"))
        prompt_ids, use = await encode_prompt(body, size, service)
        prompt_ids = truncated(prompt_ids, body, service.client.info.max_model_len, max_tokens)
        thinks = body.template_options().get("enable_thinking") is not False
        held = await held_to(service.output, use, text, service.output.begins_thinking(prompt_ids), thinks)
        params = sampling_params(
            body,
            service.suggested,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=None if held is None else held.grammar,
            thinking=thinking_limit(body, service.output, prompt_ids),
        )
    reader = partial(service.output.reader, prompt_ids, use.tools, params)
    jobs = jobs_of(response_id, [prompt_ids], params, body.n or 1, reader)
    grammar_of = "" if held is None else "functions" if use.functions and held.field == "tools" else held.field
    fields = body.spelled() | {"prompt": "messages", "grammar": grammar_of}
    fields = {**spelling.fields, **{ours: spelling.fields.get(name, name) for ours, name in fields.items()}}
    taken = asyncio.Event()
    news = naming_fields(generate(service, jobs, arrived, taken), fields)
    return Conversation(response_id, prompt_ids, params, use, news, taken)


class Choice:
    """What one sequence's deltas say, by the rules of the request's tools; and how many of its tokens are reasoning,
    None where that cannot be told."""

    def __init__(self, talk: Conversation, output: OutputFormat) -> None:
        self._parallel = talk.use.parallel  # otherwise all calls but the first are left out
        self._count = output.thinking_count(talk.prompt_ids)
        self.called = False

    @property
    def reasoning_tokens(self) -> int | None:
        return None if self._count is None else self._count.tokens

    def events(self, delta: Delta) -> list[Event]:
        if self._count is not None:
            for token in delta.token_ids:
                self._count.take(token)
        events = delta.events
        if events is None:
            return [Content(delta.text)] if delta.text else []
        if not self._parallel:
            events = [e for e in events if isinstance(e, Content | Reasoning) or e.index == 0]
        self.called = self.called or any(isinstance(e, CallBegin) for e in events)
        return events


def _tool_use(body: ChatBody, service: Service) -> ToolUse:
    if body.functions is None and body.function_call is None:
        return tool_use(body, service.output)
    newer = as_tools(body)
    try:
        return replace(tool_use(newer, service.output), functions=True)
    except ApiError as error:
        raise in_older_words(error) from None
