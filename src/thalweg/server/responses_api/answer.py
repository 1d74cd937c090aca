"""A response, whole or as events, of what the engine gives."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from thalweg.server.conversation import Choice, Conversation
from thalweg.server.errors import ApiError
from thalweg.server.logprobs import chat_logprobs
from thalweg.server.parsers.events import Content
from thalweg.server.parts import Part, Parts, Step
from thalweg.server.responses import new_id, now, sendable
from thalweg.server.responses_api.schemas import ResponsesBody
from thalweg.server.responses_api.translate import namespaces
from thalweg.server.service import Service
from thalweg.text.output import Delta
from thalweg.tokenizer.messages import plain_data

Finished = Callable[[dict[str, Any], dict[str, Any]], Awaitable[bool]]  # (response, the assistant's message)


class ResponseAnswer:
    """`whole` or `events`, once. What the events add up to is the whole. `finished` hears of the answer before its end
    is sent, if it did not fail, and says whether it was stored; `stored` is what is said of that until then."""

    def __init__(
        self, service: Service, talk: Conversation, body: ResponsesBody, stored: bool, finished: Finished
    ) -> None:
        self._talk, self._finished = talk, finished
        self._choice, self._parts = Choice(talk, service.output), Parts()
        self._tokenizer = service.client.codec.tokenizer
        self._items: list[_Item] = []
        self._output_tokens = self._cached_tokens = 0
        self._entries: list[Any] = []  # log-probabilities that no text has come for yet
        self._status, self._incomplete = "in_progress", False
        self._number = 0
        self._namespaces = namespaces(body.tools)
        self._given = _given(body, talk, service.names[0], stored)

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self._talk.news) as news:
            async for _, delta in news:
                for _ in self._events(delta):
                    pass
        return await self._end()

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        async with aclosing(self._talk.news) as news:
            async for _, delta in news:
                for event in self._begun():
                    yield event
                for event in self._events(delta):
                    yield event
        response = await self._end()
        yield self._event(f"response.{self._status}", response=response)

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """The last events of a stream that broke off."""
        begun = self._begun()
        self._status = "failed"
        said = {"code": error.code or "server_error", "message": str(error)}
        return [*begun, self._event("response.failed", response=self._response() | {"error": said, "store": False})]

    def _begun(self) -> list[dict[str, Any]]:
        """What a stream begins with, once, whatever comes of it."""
        if self._number:
            return []
        return [self._event(f"response.{kind}", response=self._response()) for kind in ("created", "in_progress")]

    def _events(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """What `delta` adds, counted."""
        self._output_tokens += len(delta.token_ids)
        self._cached_tokens += delta.num_cached_tokens
        if delta.logprobs is not None:
            self._entries.append(delta.logprobs)
        events = self._choice.events(delta)
        if events and not any(isinstance(event, Content) for event in events):
            self._entries = []
        steps: list[Step] = list(self._parts.feed(events))
        if delta.finish_reason is not None:
            self._incomplete = delta.finish_reason == "length"
            steps += self._parts.end()
        for step in steps:
            yield from self._of_step(*step)

    def _of_step(self, kind: str, part: Part, text: str) -> Iterator[dict[str, Any]]:
        if kind == "begin":
            self._items.append(_Item(part, self._namespaces))
        item = self._items[part.index]
        if kind == "begin":
            yield self._event("response.output_item.added", output_index=part.index, item=item.shown("in_progress"))
            if (first := item.content("")) is not None:
                yield self._of_item("response.content_part.added", item, part=first)
        elif kind == "more":
            more = self._take_logprobs(item) if part.kind == "text" else {}
            yield self._of_item(f"response.{item.EVENTS[part.kind]}.delta", item, delta=text, **more)
        else:
            # Whatever is cut off by the limit is the last part.
            item.status = "incomplete" if self._incomplete and part is self._parts.all[-1] else "completed"
            name = "arguments" if part.kind == "call" else "text"
            more = {"logprobs": item.logprobs} if part.kind == "text" else {"name": item.name} if part.call else {}
            yield self._of_item(f"response.{item.EVENTS[part.kind]}.done", item, **{name: part.text}, **more)
            if (last := item.content(part.text)) is not None:
                yield self._of_item("response.content_part.done", item, part=last)
            yield self._event("response.output_item.done", output_index=part.index, item=item.shown(item.status))

    def _take_logprobs(self, item: _Item) -> dict[str, Any]:
        entries, self._entries = self._entries, []
        found = chat_logprobs(self._tokenizer, entries)["content"] if entries else []
        item.logprobs += found
        return {"logprobs": found}

    def _of_item(self, kind: str, item: _Item, **more: Any) -> dict[str, Any]:
        place = {} if item.part.kind == "call" else {"content_index": 0}
        return self._event(kind, item_id=item.id, output_index=item.part.index, **place, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}

    async def _end(self) -> dict[str, Any]:
        self._status = "incomplete" if self._incomplete else "completed"
        response = self._response()
        response["store"] = await self._finished(response, self._message())
        return response

    def _message(self) -> dict[str, Any]:
        """The answer as a message of a chat."""
        parts = self._parts.all
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(part.text for part in parts if part.kind == "text"),
            "reasoning_content": "".join(part.text for part in parts if part.kind == "reasoning") or None,
            "tool_calls": [
                {"id": p.call.id, "type": "function", "function": {"name": p.call.name, "arguments": p.text}}
                for p in parts
                if p.call is not None
            ]
            or None,
        }
        return {key: value for key, value in message.items() if value is not None}

    def _response(self) -> dict[str, Any]:
        ended = self._status in ("completed", "incomplete")
        return self._given | {
            "status": self._status,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "output": [item.shown(item.status) for item in self._items],
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, output = len(self._talk.prompt_ids), self._output_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self._cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": self._choice.reasoning_tokens or 0},
            "total_tokens": prompt + output,
        }


class _Item:
    """A part of the answer as an item of a response's output."""

    PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}  # noqa: RUF012
    EVENTS = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}  # noqa: RUF012

    def __init__(self, part: Part, namespaces: Mapping[str, tuple[str, str]]) -> None:
        self.name = "" if part.call is None else part.call.name
        self.namespace: str | None = None
        if self.name in namespaces:
            self.namespace, self.name = namespaces[self.name]
        self.part, self.id = part, new_id(self.PREFIXES[part.kind], "_")
        self.status = "in_progress"
        self.logprobs: list[dict[str, Any]] = []

    def content(self, text: str) -> dict[str, Any] | None:
        """What an item's content consists of; a call has none."""
        if self.part.kind == "call":
            return None
        if self.part.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*self.logprobs] if text else []}

    def shown(self, status: str) -> dict[str, Any]:
        """The item with what has come of it, or nothing of it yet while it is in progress."""
        text = "" if status == "in_progress" else self.part.text
        content = [] if status == "in_progress" else [self.content(text)]
        if (call := self.part.call) is not None:
            kind: dict[str, Any] = {"type": "function_call", "call_id": call.id, "name": self.name, "arguments": text}
            if self.namespace is not None:
                kind["namespace"] = self.namespace
        elif self.part.kind == "reasoning":
            kind = {"type": "reasoning", "summary": [], "content": content}
        else:
            kind = {"type": "message", "role": "assistant", "content": content}
        return {"id": self.id, "status": status, **kind}


def _given(body: ResponsesBody, talk: Conversation, model: str, stored: bool) -> dict[str, Any]:
    """What a response says of its request. Raises InvalidRequest for what nests too deep."""
    reasoning = body.reasoning
    echoed = {
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "text": {"format": {"type": "text"}, **(body.text.model_dump(exclude_none=True) if body.text else {})},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "user": body.user,
    }
    return {
        "id": talk.id,
        "object": "response",
        "created_at": now(),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "service_tier": "default",
        "store": stored,
        "temperature": talk.params.temperature,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": talk.params.top_p,
        "truncation": "disabled",
        "usage": None,
        **{name: sendable(plain_data(value, name)) for name, value in echoed.items()},
    }
