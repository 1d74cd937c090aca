"""Runs the sequences of one HTTP request side by side and merges their news into one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from thalweg.core import SamplingParams
from thalweg.errors import InvalidRequest
from thalweg.server.errors import ApiError, respelled
from thalweg.server.params import per_choice
from thalweg.server.service import Service
from thalweg.text.output import Delta, TextReader

News = AsyncGenerator[tuple[int, Delta]]  # (choice index, what came of it)


@dataclass(frozen=True, slots=True)
class Job:
    """A request of the engine for one choice of the answer. `id` is the engine's name for it."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    reader: TextReader | None = None  # each job has one of its own


def jobs_of(
    response_id: str,
    prompts: list[list[int]],
    params: SamplingParams,
    n: int,
    reader: Callable[[], TextReader | None] = lambda: None,
) -> list[Job]:
    """n jobs per prompt, each with a new `reader`; the job at index i is the answer's choice i."""
    each = [(ids, own) for ids in prompts for own in per_choice(params, n)]
    return [Job(f"{response_id}-{i}", ids, own, reader()) for i, (ids, own) in enumerate(each)]


async def generate(service: Service, jobs: list[Job], arrived: float, taken: asyncio.Event) -> News:
    """Every job's deltas as they come. Closing it, or the first error, ends all the jobs. `taken` is set once the
    engine has taken in all of them, from when on nothing of the request can be wrong.

    Raises ThalwegError, ApiError 429 when the queue is full, or ApiError 500 when a job failed while running.
    """
    outside = len(jobs)

    def begin(job: Job) -> AsyncGenerator[Delta]:
        return _run(service, job, arrived, took)

    def took() -> None:
        nonlocal outside
        outside -= 1
        if not outside:
            taken.set()

    with service.room_for(len(jobs)):
        if len(jobs) == 1:
            async with aclosing(begin(jobs[0])) as deltas:
                async for delta in deltas:
                    yield 0, delta
        else:
            async with aclosing(_merged(jobs, begin)) as news:
                async for item in news:
                    yield item


async def _merged(jobs: list[Job], begin: Callable[[Job], AsyncGenerator[Delta]]) -> News:
    # Bounded, so that what a slow client does not read piles up in one place, which gives up on it.
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(len(jobs))

    async def pump(index: int, job: Job) -> None:
        end: Exception | None = None
        try:
            async with aclosing(begin(job)) as deltas:
                async for delta in deltas:
                    await queue.put((index, delta))
        except Exception as error:  # noqa: BLE001 -- raised again where the stream is read
            end = error
        await queue.put((index, end))

    tasks = [asyncio.create_task(pump(i, job)) for i, job in enumerate(jobs)]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if isinstance(item, Delta):
                yield index, item
            elif item is None:
                running -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def naming_fields(news: News, fields: Mapping[str, str]) -> News:
    """`news`, with errors laid to the request's field that the prompt, grammar or parameter was made of."""
    async with aclosing(news):
        try:
            async for item in news:
                yield item
        except InvalidRequest as e:
            raise respelled(e, fields) from None


async def _run(service: Service, job: Job, arrived: float, took: Callable[[], None]) -> AsyncGenerator[Delta]:
    """The deltas that have something to say; the first of all only says that the engine took the job in."""
    deltas = _failing(service.client.generate(job.prompt_token_ids, job.params, job.id, job.reader))
    first = True
    async with aclosing(service.metrics.observed(deltas, arrived)) as observed:
        async for delta in observed:
            if first:
                first = False
                took()
            if delta.token_ids or delta.finish_reason is not None or delta.prompt_logprobs is not None:
                yield delta


async def _failing(deltas: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
    """`deltas`, the last of which is raised if it is an error: InvalidRequest if the request's grammar is to blame."""
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.finish_reason == "error":
                reason = delta.error or ""
                if reason.startswith("the grammar"):
                    raise InvalidRequest(reason)
                raise ApiError(500, f"the request failed while running: {reason}", code="request_failed")
            yield delta
