"""POST /v1/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from thalweg.core import SamplingParams, TokenLogprobs
from thalweg.engine.sessions import SavedSession, longest_answer
from thalweg.server.bodies import BodyRoute
from thalweg.server.errors import ApiError
from thalweg.server.generation import Job, News, generate, jobs_of, naming_fields
from thalweg.server.logprobs import LogprobsBuilder
from thalweg.server.params import refuse_unsupported, sampling_params, truncated
from thalweg.server.responses import CompletionChoice, CompletionLogprobs, Envelope, Usage, new_id, now
from thalweg.server.schemas import CompletionBody
from thalweg.server.service import Service, ServiceDep
from thalweg.server.sessions import saving, session_of
from thalweg.server.settings import MAX_PROMPTS
from thalweg.server.streaming import stream, whole
from thalweg.server.structured import wanted
from thalweg.text.output import Delta
from thalweg.text.prompts import Prompt
from thalweg.tokenizer.base import valid_unicode

DEFAULT_MAX_TOKENS = 16

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request, service: ServiceDep) -> Response:
    """Continue one prompt or several, each a text or token ids. Choices come in the prompts' order, n for each.

    With `echo` a choice begins with its prompt, and `logprobs` covers it: with max_tokens 0 or 1 that is how
    evaluation harnesses score a text.
    """
    arrived = time.perf_counter()
    service.check(body.model)
    _refuse_unsupported(body, service)
    text, max_tokens = await wanted(body), body.limit(DEFAULT_MAX_TOKENS)
    params = sampling_params(
        body,
        service.suggested,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=None if text is None else text.grammar,
    )
    prompts, n = _prompts(body), body.n or 1
    if len(prompts) * n > MAX_PROMPTS:
        raise ApiError(
            400, f"{len(prompts)} prompts with n {n} came; expected at most {MAX_PROMPTS} choices", param="n"
        )
    session = session_of(service, request, body, len(prompts) * n)
    encoded = await _encoded(service, prompts, session)
    new, version = encoded[0], 0
    if session is not None:
        encoded, version = [session.ids + new], session.version
    if body.truncate_prompt_tokens is not None:
        encoded = [truncated(ids, body, service.client.info.max_model_len, max_tokens) for ids in encoded]
        prompts = list(encoded)
    echoes: list[str | None] = [None] * len(prompts)
    if body.echo:
        echoes = [await _text(service, *pair) for pair in zip(prompts, encoded, strict=True)]
    response_id = new_id("cmpl")
    jobs = jobs_of(response_id, encoded, params, n)
    with_ids = bool(body.return_token_ids)
    choices = [_Choice(service, i, job, echoes[i // n], with_ids) for i, job in enumerate(jobs)]
    completion = _Completion(service, response_id, sum(map(len, encoded)), choices, n)
    fields = body.spelled() | ({} if text is None else {"grammar": text.field})
    taken = asyncio.Event()
    news = naming_fields(generate(service, jobs, arrived, taken), fields)
    if session is not None and body.session_save:
        answer = longest_answer(max_tokens, len(encoded[0]), service.client.info.max_model_len)
        news = saving(service, session, version, news, new, answer)
    if not body.stream:
        return await whole(request, completion.answer(news))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return await stream(request, completion.chunks(news, usage), taken, service.settings.ping_seconds)


class _Choice:
    """One sequence's text and logprobs, in pieces as they become known. `echo`: the prompt's text, to begin with.

    With `with_ids` a piece comes for each step's tokens, even if they have no text yet.
    """

    def __init__(self, service: Service, index: int, job: Job, echo: str | None, with_ids: bool) -> None:
        self._index, self._echo, self._with_ids = index, echo, with_ids
        self._begun = False
        self._prompt_ids = job.prompt_token_ids
        self._params: SamplingParams = job.params
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]  # the first token has none
        self._builder = None
        if job.params.logprobs is not None:
            self._builder = LogprobsBuilder(service.client.codec.tokenizer)

    def take(self, delta: Delta) -> CompletionChoice | None:
        """What `delta` adds to the choice, None when that is nothing."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs += delta.prompt_logprobs
        if not delta.token_ids and delta.finish_reason is None:
            return None  # part of a prompt was prefilled; its echo waits for the rest
        text = delta.text
        if self._echo is not None:
            text, self._echo = self._echo + text, None
            self._add_prompt()
        builder = self._builder
        if builder is not None:
            for token_id in delta.token_ids:
                builder.add(token_id, delta.logprobs, skip_special=self._params.skip_special_tokens)
        logprobs = None if builder is None else builder.take()
        if self._with_ids:
            prompt_ids = UNSET if self._begun else self._prompt_ids
            self._begun = True
            return CompletionChoice(self._index, text, logprobs, delta.finish_reason, delta.token_ids, prompt_ids)
        if not text and delta.finish_reason is None and (logprobs is None or not logprobs.tokens):
            return None
        return CompletionChoice(self._index, text, logprobs, delta.finish_reason)

    def _add_prompt(self) -> None:
        if self._builder is not None:
            for token_id, entry in zip(self._prompt_ids, self._prompt_logprobs, strict=True):
                self._builder.add(token_id, entry, skip_special=False)


class _Completion:
    """Makes one response, whole or in chunks, of what its choices give."""

    def __init__(
        self, service: Service, response_id: str, prompt_tokens: int, choices: list[_Choice], per_prompt: int
    ) -> None:
        self._id, self._choices, self._per_prompt = response_id, choices, per_prompt
        self._prompt_tokens, self._completion_tokens, self._cached_tokens = prompt_tokens, 0, 0
        self._model, self._created = service.names[0], now()

    async def answer(self, news: News) -> Envelope:
        pieces: list[list[CompletionChoice]] = [[] for _ in self._choices]
        async with aclosing(news):
            async for index, delta in news:
                self._count(index, delta)
                if (piece := self._choices[index].take(delta)) is not None:
                    pieces[index].append(piece)
        return self._envelope([_joined(own) for own in pieces], usage=self._usage())

    async def chunks(self, news: News, include_usage: bool) -> AsyncGenerator[Envelope]:
        extra = {"usage": None} if include_usage else {}
        async with aclosing(news):
            async for index, delta in news:
                self._count(index, delta)
                if (piece := self._choices[index].take(delta)) is not None:
                    yield self._envelope([piece], **extra)
        if include_usage:
            yield self._envelope([], usage=self._usage())

    def _count(self, index: int, delta: Delta) -> None:
        self._completion_tokens += len(delta.token_ids)
        if index % self._per_prompt == 0:  # a prompt's other choices find what the first one computed
            self._cached_tokens += delta.num_cached_tokens

    def _usage(self) -> Usage:
        return Usage.of(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def _envelope(self, choices: list[CompletionChoice], **more: Any) -> Envelope:
        return Envelope(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **more,
        )


def _joined(pieces: list[CompletionChoice]) -> CompletionChoice:
    """One choice of its pieces; the last has the finish reason."""
    last = pieces[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = CompletionLogprobs()
        for piece in pieces:
            if (own := piece.logprobs) is not None:
                logprobs.text_offset += own.text_offset
                logprobs.tokens += own.tokens
                logprobs.token_logprobs += own.token_logprobs
                logprobs.top_logprobs += own.top_logprobs
    joined = CompletionChoice(last.index, "".join(p.text for p in pieces), logprobs, last.finish_reason)
    if last.token_ids is not UNSET:
        joined.token_ids = [i for p in pieces if p.token_ids is not UNSET for i in p.token_ids]
        joined.prompt_token_ids = pieces[0].prompt_token_ids
    return joined


def _prompts(body: CompletionBody) -> list[Prompt]:
    """The prompts of a request, which may be given alone; a flat list of integers is one prompt."""
    prompt = body.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)


async def _encoded(service: Service, prompts: list[Prompt], session: SavedSession | None) -> list[list[int]]:
    """Token ids of the prompts; of one alone, which may be empty, if it continues from a session."""
    if session is None:
        return await service.encode_prompts(prompts)
    if len(prompts) != 1:
        raise ApiError(400, f"prompt has {len(prompts)} texts; expected one text after a session", param="prompt")
    return await service.encode_prompts(prompts) if prompts[0] else [[]]


async def _text(service: Service, prompt: Prompt, ids: list[int]) -> str:
    return valid_unicode(prompt) if isinstance(prompt, str) else await service.decode(ids)


def _refuse_unsupported(body: CompletionBody, service: Service) -> None:
    refuse_unsupported(body, service.client.codec.tokenizer)
    if body.suffix:
        raise ApiError(400, "suffix is not supported; expected it left out", param="suffix", code="unsupported")
