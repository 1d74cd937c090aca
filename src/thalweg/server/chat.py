"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from thalweg.core import TokenLogprobs
from thalweg.engine.output import Delta
from thalweg.errors import InvalidRequest
from thalweg.server.errors import ApiError, as_api_error
from thalweg.server.generation import News, generate, jobs_of
from thalweg.server.logprobs import chat_logprobs
from thalweg.server.params import refuse_unsupported, sampling_params
from thalweg.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    Envelope,
    Usage,
    new_id,
    now,
)
from thalweg.server.schemas import ChatBody
from thalweg.server.service import Service, ServiceDep
from thalweg.server.streaming import stream, whole
from thalweg.tokenizer.base import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, service: ServiceDep) -> Response:
    """Answer a conversation; max_tokens defaults to what the context has room for."""
    arrived = time.perf_counter()
    service.check(body.model)
    _refuse_unsupported(body)
    params = sampling_params(
        body,
        service.suggested,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    prompt_ids = await service.encode_chat([_message(m) for m in body.messages], tools=None, **body.template_options())
    chat = _Chat(service, new_id("chatcmpl"), len(prompt_ids), body.n or 1)
    news = _from_messages(generate(service, jobs_of(chat.id, [prompt_ids], params, chat.n), arrived))
    if not body.stream:
        return await whole(request, chat.answer(news))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return await stream(request, chat.chunks(news, usage))


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


class _Chat:
    """Makes one response, whole or in chunks, of what its choices' sequences give."""

    def __init__(self, service: Service, response_id: str, prompt_tokens: int, n: int) -> None:
        self.id, self.n = response_id, n
        self._prompt_tokens, self._completion_tokens = prompt_tokens, 0
        self._model, self._created = service.names[0], now()
        self._tokenizer: Tokenizer | None = service.client.front.tokenizer

    async def answer(self, news: News) -> Envelope:
        choices = [_Choice() for _ in range(self.n)]
        async with aclosing(news):
            async for index, delta in news:
                choice = choices[index]
                self._completion_tokens += len(delta.token_ids)
                choice.text.append(delta.text)
                if delta.logprobs is not None:
                    choice.logprobs.append(delta.logprobs)
                choice.finish_reason = delta.finish_reason
        made = [
            ChatChoice(i, ChatMessage("".join(c.text)), self._logprobs(c.logprobs), c.finish_reason)
            for i, c in enumerate(choices)
        ]
        return self._envelope("chat.completion", made, usage=Usage.of(self._prompt_tokens, self._completion_tokens))

    async def chunks(self, news: News, include_usage: bool) -> AsyncGenerator[Envelope]:
        extra = {"usage": None} if include_usage else {}
        begun = [False] * self.n

        def chunk(choice: ChatChunkChoice) -> Envelope:
            return self._envelope("chat.completion.chunk", [choice], **extra)

        async with aclosing(news):
            async for index, delta in news:
                if not begun[index]:
                    begun[index] = True
                    yield chunk(ChatChunkChoice(index, ChatDelta("assistant", "")))
                self._completion_tokens += len(delta.token_ids)
                if (choice := self._chunk_choice(index, delta)) is not None:
                    yield chunk(choice)
        if include_usage:
            yield self._envelope(
                "chat.completion.chunk", [], usage=Usage.of(self._prompt_tokens, self._completion_tokens)
            )

    def _chunk_choice(self, index: int, delta: Delta) -> ChatChunkChoice | None:
        """None when there is nothing to say: text may be held back while it could become a stop string."""
        if not delta.text and delta.logprobs is None and delta.finish_reason is None:
            return None
        logprobs = self._logprobs([] if delta.logprobs is None else [delta.logprobs])
        return ChatChunkChoice(index, ChatDelta(content=delta.text or None), logprobs, delta.finish_reason)

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, entries) if entries else None

    def _envelope(self, kind: str, choices: list[Any], **more: Any) -> Envelope:
        return Envelope(id=self.id, object=kind, created=self._created, model=self._model, choices=choices, **more)


async def _from_messages(news: News) -> News:
    """`news`, with what is wrong with the prompt laid to the messages that it was made of."""
    async with aclosing(news):
        try:
            async for item in news:
                yield item
        except InvalidRequest as e:
            error = as_api_error(e)
            if error.param == "prompt":
                error.param = "messages"
            raise error from None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # "developer" is OpenAI's newer word for the same role; templates mostly know only the older one.
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _refuse_unsupported(body: ChatBody) -> None:
    refuse_unsupported(body)
    if body.tools and body.tool_choice != "none":
        raise ApiError(
            400,
            "tools are given and tool calls are not supported yet; leave them out or set tool_choice to none",
            param="tools",
            code="unsupported",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given and logprobs is not true; expected both", param="top_logprobs")
