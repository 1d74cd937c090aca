"""A chat completion, whole or in chunks, of what its choices' sequences give."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, UnsetType

from thalweg.core import TokenLogprobs
from thalweg.server.conversation import Choice, Conversation
from thalweg.server.logprobs import chat_logprobs
from thalweg.server.parsers.events import CallBegin, Content, Event, Reasoning
from thalweg.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    Envelope,
    FunctionCall,
    ToolCall,
    Usage,
    now,
)
from thalweg.server.service import Service
from thalweg.text.output import Delta
from thalweg.tokenizer.base import Tokenizer


class ChatAnswer:
    """`whole` or `chunks`, once. Both read the output the same way, so what a stream adds up to is the whole.

    With `with_ids` the answer has its tokens and the prompt's, and a stream a chunk for each step's tokens, even if
    they have no text yet.
    """

    def __init__(self, service: Service, talk: Conversation, n: int, with_ids: bool = False) -> None:
        self.id, self._news = talk.id, talk.news
        self._prompt_tokens, self._completion_tokens, self._cached_tokens = len(talk.prompt_ids), 0, 0
        self._prompt_ids, self._with_ids = talk.prompt_ids, with_ids
        self._model, self._created = service.names[0], now()
        self._tokenizer: Tokenizer | None = service.client.codec.tokenizer
        self._choices = [Choice(talk, service.output) for _ in range(n)]
        self._functions = talk.use.functions

    async def whole(self) -> Envelope:
        pieces: list[_Pieces] = [_Pieces() for _ in self._choices]
        async with aclosing(self._news) as news:
            async for index, delta in news:
                self._count(index, delta)
                own = pieces[index]
                own.add(self._choices[index].events(delta))
                own.token_ids += delta.token_ids
                if delta.logprobs is not None:
                    own.logprobs.append(delta.logprobs)
                own.finish_reason = self._finish_reason(index, delta)
        made = [
            ChatChoice(
                i, p.message(self._functions), self._logprobs(p.logprobs), p.finish_reason, self._ids(p.token_ids)
            )
            for i, p in enumerate(pieces)
        ]
        prompt_ids = self._ids(self._prompt_ids)
        return self._envelope("chat.completion", made, usage=self._usage(), prompt_token_ids=prompt_ids)

    async def chunks(self, include_usage: bool) -> AsyncGenerator[Envelope]:
        extra = {"usage": None} if include_usage else {}
        begun = [False] * len(self._choices)

        def chunk(choice: ChatChunkChoice, **more: Any) -> Envelope:
            return self._envelope("chat.completion.chunk", [choice], **extra, **more)

        async with aclosing(self._news) as news:
            async for index, delta in news:
                if not begun[index]:
                    prompt_ids = UNSET if any(begun) else self._ids(self._prompt_ids)
                    begun[index] = True
                    yield chunk(ChatChunkChoice(index, ChatDelta("assistant", "")), prompt_token_ids=prompt_ids)
                self._count(index, delta)
                if (choice := self._chunk_choice(index, delta)) is not None:
                    yield chunk(choice)
        if include_usage:
            yield self._envelope("chat.completion.chunk", [], usage=self._usage())

    def _chunk_choice(self, index: int, delta: Delta) -> ChatChunkChoice | None:
        """None when there is nothing to say: text may be held back while it could become something else."""
        events = self._choices[index].events(delta)
        if not events and delta.logprobs is None and delta.finish_reason is None and not self._with_ids:
            return None
        logprobs = self._logprobs([] if delta.logprobs is None else [delta.logprobs])
        finish_reason = self._finish_reason(index, delta)
        return ChatChunkChoice(
            index, _delta(events, self._functions), logprobs, finish_reason, self._ids(delta.token_ids)
        )

    def _finish_reason(self, index: int, delta: Delta) -> str | None:
        if not self._choices[index].called or delta.finish_reason != "stop":
            return delta.finish_reason
        return "function_call" if self._functions else "tool_calls"

    def _ids(self, ids: list[int]) -> list[int] | UnsetType:
        return ids if self._with_ids else UNSET

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, entries) if entries else None

    def _count(self, index: int, delta: Delta) -> None:
        self._completion_tokens += len(delta.token_ids)
        if index == 0:  # the others find what the first one computed
            self._cached_tokens += delta.num_cached_tokens

    def _usage(self) -> Usage:
        reasoning = [c.reasoning_tokens for c in self._choices if c.reasoning_tokens is not None]
        total = sum(reasoning) if reasoning else None
        return Usage.of(self._prompt_tokens, self._completion_tokens, self._cached_tokens, total)

    def _envelope(self, kind: str, choices: list[Any], **more: Any) -> Envelope:
        return Envelope(id=self.id, object=kind, created=self._created, model=self._model, choices=choices, **more)


@dataclass(slots=True)
class _Pieces:
    """What came of one choice of a whole answer."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[CallBegin, list[str]]] = field(default_factory=list)  # each with its arguments
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                self.content.append(event.text)
            elif isinstance(event, Reasoning):
                self.reasoning.append(event.text)
            elif isinstance(event, CallBegin):
                self.calls.append((event, []))
            else:
                self.calls[event.index][1].append(event.text)

    def message(self, functions: bool) -> ChatMessage:
        calls = [
            ToolCall(FunctionCall(begin.name, "".join(arguments)), id=begin.id, type="function")
            for begin, arguments in self.calls
        ]
        content = "".join(self.content)
        return ChatMessage(
            content if content or not calls else None,
            reasoning_content="".join(self.reasoning) or UNSET,
            tool_calls=calls if calls and not functions else UNSET,
            function_call=calls[0].function if calls and functions else UNSET,
        )


def _delta(events: list[Event], functions: bool) -> ChatDelta:
    """What a chunk has of one step's events."""
    delta = ChatDelta()
    calls: dict[int, ToolCall] = {}
    for event in events:
        if isinstance(event, Content):
            delta.content = (delta.content or "") + event.text
        elif isinstance(event, Reasoning):
            delta.reasoning_content = (delta.reasoning_content or "") + event.text
        elif isinstance(event, CallBegin):
            calls[event.index] = ToolCall(FunctionCall(event.name, ""), event.index, event.id, "function")
        else:
            call = calls.setdefault(event.index, ToolCall(FunctionCall(arguments=""), event.index))
            call.function.arguments = (call.function.arguments or "") + event.text
    if calls and functions:
        delta.function_call = next(iter(calls.values())).function
    else:
        delta.tool_calls = list(calls.values()) or None
    return delta
