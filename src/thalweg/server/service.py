"""What every route shares: the engine's client and its state, the model's names, the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from thalweg.engine.processes.client import EngineClient
from thalweg.engine.sessions import Sessions
from thalweg.server.errors import RETRY_AFTER, ApiError
from thalweg.server.functions import newer_messages
from thalweg.server.metrics import Metrics
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.responses import now
from thalweg.server.responses_api.store import ResponseStore
from thalweg.server.settings import LONG_TEXT, ServerSettings
from thalweg.server.system_messages import one_system_message
from thalweg.text.prompts import Prompt, check_token_ids, encode_prompt

Result = TypeVar("Result")
TEND_SECONDS = 5.0
StartListener = Callable[[Exception | None], None]


class Service:
    """One engine behind one HTTP application. It answers 503 until `start` is done and after the engine died."""

    def __init__(self, client: EngineClient, settings: ServerSettings) -> None:
        source = client.codec.source
        self.client, self.settings = client, settings
        self.metrics = Metrics(client)
        self.suggested = source.generation.sampling
        self.output = OutputFormat.of(client.codec, settings.tool_call_parser, settings.reasoning_parser)
        self.names = settings.served_model_names or (source.name,)
        # A client may also use the folder's name or path, whatever the model is served as.
        self._also_names = frozenset({*self.names, source.name, str(source.folder)})
        self.created = now()
        self.stored = ResponseStore(settings.stored)
        self.sessions = Sessions(settings.sessions, client.release)
        self._ready = False
        self._unfinished = 0

    async def start(self, on_started: StartListener) -> None:
        """Start the engine, then tell `on_started` of it, or of why it did not start."""
        try:
            await self.client.start()
        except Exception as error:  # noqa: BLE001 -- whatever it was ends the server, which says so
            on_started(error)
        else:
            self.sessions.most_points = self.client.info.most_session_points
            if self.settings.expert_metrics:
                await self.metrics.count_experts()  # from now on
            self._ready = True
            on_started(None)

    async def tend(self) -> None:
        """End sessions in time, used or not: what is kept of them is then free for others. Never returns."""
        while True:
            await asyncio.sleep(TEND_SECONDS)
            self.sessions.expire()

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Counts `count` sequences as unfinished until the context ends.

        Raises ApiError 429 when the queue has no room for all of them, 400 when it could never have.
        """
        most = self.client.info.sequences_at_once + self.settings.max_queued_requests
        if count > most:
            raise ApiError(400, f"the request has {count} sequences; expected at most {most} (--max-queued-requests)")
        if self._unfinished + count > most:
            self.metrics.rejected("queue_full")
            raise ApiError(
                429,
                f"{self._unfinished} of at most {most} sequences are unfinished; try later (--max-queued-requests)",
                code="queue_full",
                headers={"Retry-After": RETRY_AFTER},
            )
        self._unfinished += count
        try:
            yield
        finally:
            self._unfinished -= count

    def check_alive(self) -> None:
        """Raises ApiError 503 when no request can be served now."""
        if not self._ready:
            raise ApiError(
                503,
                "the engine is starting; try again soon",
                code="engine_starting",
                headers={"Retry-After": RETRY_AFTER},
            )
        if self.client.dead is not None:
            raise self.client.dead

    def check(self, model: str | None) -> None:
        """check_alive, and ApiError 404 when `model` is given and another than the one served."""
        self.check_alive()
        if model is not None and model not in self._also_names:
            expected = ", ".join(self.names)
            raise ApiError(
                404,
                f"the model {model[:200]!r} is not served here; expected {expected}",
                param="model",
                code="model_not_found",
            )

    async def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each text or list of ids, checked. Raises InvalidRequest."""
        tokenizer, vocab_size = self.client.codec.tokenizer, self.client.info.vocab_size

        def encode() -> list[list[int]]:
            return [encode_prompt(prompt, tokenizer, vocab_size) for prompt in prompts]

        return await maybe_in_thread(sum(map(len, prompts)), encode)

    async def encode_chat(self, size: int, messages: list[dict[str, Any]], /, **options: Any) -> list[int]:
        """Token ids of a conversation, by the chat template under `options`. Raises InvalidRequest.

        `size`: of the request's body and what it continues from, in bytes, because text may be anywhere in them: in
        parts of a content, in calls, in tools.
        """
        codec = self.client.codec

        def encode() -> list[int]:
            laid_out: Sequence[dict[str, Any]] = newer_messages(messages)
            if codec.template is not None:
                laid_out = one_system_message(laid_out, codec.template)
            return codec.chat_ids(laid_out, **options)

        return await maybe_in_thread(size, encode)

    async def decode(self, token_ids: list[int]) -> str:
        """The text of ids, special tokens included. Raises InvalidRequest on one that no token has."""
        tokenizer, vocab_size = self.client.codec.tokenizer, self.client.info.vocab_size
        if tokenizer is None:
            raise ApiError(400, "the model folder has no tokenizer; only token ids go in and out")
        return await maybe_in_thread(len(token_ids), lambda: tokenizer.decode(check_token_ids(token_ids, vocab_size)))


async def maybe_in_thread(size: int, function: Callable[[], Result]) -> Result:
    """function(), off the event loop when `size` says that it takes long enough to hold up other requests."""
    if size < LONG_TEXT:
        return function()
    return await asyncio.to_thread(function)


def _service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service_of)]
