"""A message in Anthropic's shape, whole or as events, of what the engine gives."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from thalweg.server.conversation import Choice, Conversation
from thalweg.server.parts import Part, Parts, Step
from thalweg.server.service import Service
from thalweg.text.output import Delta

# Thinking is not signed here, and what comes back is not checked; clients drop blocks whose signature is empty.
SIGNATURE = "unsigned"

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_DELTAS = {"text": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking")}


class MessageAnswer:
    """`whole` or `events`, once. What the events add up to is the whole. `omit`: of thinking only that there was
    some."""

    def __init__(self, service: Service, talk: Conversation, omit: bool) -> None:
        self._talk, self._model, self._omit = talk, service.names[0], omit
        self._choice, self._parts = Choice(talk, service.output), Parts()
        self._output_tokens = self._cached_tokens = 0
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self._talk.news) as news:
            async for _, delta in news:
                for _ in self._steps(delta):
                    pass
        return self._message([_block(part, "" if self._omits(part) else part.text) for part in self._parts.all])

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        begun = False
        async with aclosing(self._talk.news) as news:
            async for _, delta in news:
                steps = list(self._steps(delta))
                if not begun:
                    begun = True
                    none = {"stop_reason": None, "stop_sequence": None}
                    yield {"type": "message_start", "message": self._message([]) | none}
                for kind, part, text in steps:
                    if kind != "more" or not self._omits(part):
                        for event in _events(kind, part, text):
                            yield event
        end = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        yield {"type": "message_delta", "delta": end, "usage": self._usage()}
        yield {"type": "message_stop"}

    def _steps(self, delta: Delta) -> list[Step]:
        """What `delta` adds, counted."""
        self._output_tokens += len(delta.token_ids)
        self._cached_tokens += delta.num_cached_tokens
        steps = list(self._parts.feed(self._choice.events(delta)))
        if delta.finish_reason is not None:
            steps += self._parts.end()
            self._end(delta)
        return steps

    def _end(self, delta: Delta) -> None:
        self._stop_reason = _STOP_REASONS.get(delta.finish_reason or "", "end_turn")
        if isinstance(delta.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", delta.stop_reason
        elif self._choice.called and self._stop_reason == "end_turn":
            self._stop_reason = "tool_use"
        elif delta.finish_reason == "length" and self._output_tokens < (self._talk.params.max_tokens or 0):
            self._stop_reason = "model_context_window_exceeded"

    def _omits(self, part: Part) -> bool:
        return self._omit and part.kind == "reasoning"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._talk.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """Tokens from the prefix cache are not part of `input_tokens`."""
        return {
            "input_tokens": len(self._talk.prompt_ids) - self._cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached_tokens,
            "output_tokens": self._output_tokens,
            "output_tokens_details": {"thinking_tokens": self._choice.reasoning_tokens or 0},
        }


def _block(part: Part, text: str, signature: str = SIGNATURE) -> dict[str, Any]:
    if part.call is not None:
        arguments = msgspec.Raw(text.encode() or b"{}")  # JSON as the model wrote it, or as it was mended
        return {"type": "tool_use", "id": part.call.id, "name": part.call.name, "input": arguments}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": signature}
    return {"type": "text", "text": text}


def _events(kind: str, part: Part, text: str) -> list[dict[str, Any]]:
    if kind == "begin":
        return [{"type": "content_block_start", "index": part.index, "content_block": _block(part, "", "")}]
    if kind == "more":
        name, field = _DELTAS.get(part.kind, ("input_json_delta", "partial_json"))
        return [_delta(part, {"type": name, field: text})]
    signed = [_delta(part, {"type": "signature_delta", "signature": SIGNATURE})] if part.kind == "reasoning" else []
    return [*signed, {"type": "content_block_stop", "index": part.index}]


def _delta(part: Part, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": part.index, "delta": delta}
