"""Sends a benchmark's requests to an OpenAI-compatible server, when they are due, and takes their times."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any

from thalweg.bench.serve_data import BenchRequest, Conversation
from thalweg.errors import ConfigError
from thalweg.http_client import HttpClient, HttpError, error_message

_IDS = "return_token_ids"  # asks for an event per token, whether it has text or not
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds; `start` is on time.perf_counter's clock.

    `ttft` is from sending it to its first token, `itls` the times between one piece with tokens and the next, `latency`
    from sending it to its last token. With a server that does not say which tokens a piece has, pieces of text count.
    `error` is None for a request that was answered to its end.
    """

    start: float
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None
    cached_tokens: int = 0  # of the input, as far as the server says so
    token_ids: list[int] = field(default_factory=list)  # likewise

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first one; None when there is only one."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive. `rate` a second (infinite: all at once) in a Poisson process, or with `burstiness` other
    than 1 one of gamma-distributed gaps, below 1 in bursts, above it more evenly; at most `max_concurrency` under way.
    """

    rate: float
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0

    def arrivals(self, count: int) -> list[float]:
        """Seconds from the start at which each request is due."""
        if self.rate == float("inf"):
            return [0.0] * count
        draw, now, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(now)
            now += draw.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
        return times


class Target:
    """An endpoint of a server and what every request to it says."""

    def __init__(
        self, http: HttpClient, endpoint: str, model: str, options: dict[str, Any], timeout_s: float | None = None
    ) -> None:
        self.http, self.endpoint, self._timeout_s = http, endpoint, timeout_s
        self._options = {
            "model": model,
            **options,
            "stream": True,
            "stream_options": {"include_usage": True},
            _IDS: True,
        }

    def body(self, request: BenchRequest) -> dict[str, Any]:
        """The JSON of a request."""
        prompt = request.prompt
        if self.endpoint == COMPLETIONS:
            if isinstance(prompt, list) and isinstance(prompt[0], dict):
                raise ConfigError(f"the dataset has chat messages; expected --endpoint {CHAT}")
            return {**self._options, "prompt": prompt, "max_tokens": request.output_len}
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            raise ConfigError(f"the dataset has token ids; expected --endpoint {COMPLETIONS}")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {**self._options, "messages": messages, "max_completion_tokens": request.output_len}

    async def send(self, request: BenchRequest) -> Outcome:
        """One request, to its end. What goes wrong is in the outcome."""
        body = self.body(request)
        outcome = Outcome(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(body, outcome)
        except TimeoutError:
            outcome.error = f"no end within {self._timeout_s:g} s"
        except HttpError as e:
            outcome.error = str(e)
        if _IDS in body and _IDS in (outcome.error or ""):  # refused by a server that takes only what it knows
            self._options.pop(_IDS, None)
            return await self.send(request)
        return outcome

    async def _stream(self, body: dict[str, Any], outcome: Outcome) -> None:
        last: float | None = None
        pieces: list[str] = []
        tokens = 0
        usage: dict[str, Any] = {}
        done = False
        async with self.http.request("POST", self.endpoint, body) as answer:
            if answer.status != 200:
                outcome.error = f"{answer.status}: {error_message(await answer.read())}"
                return
            async with aclosing(answer.events()) as events:
                async for data in events:
                    if data == b"[DONE]":
                        done = True
                        continue  # to the end of the answer, so that the connection can be used again
                    chunk = _chunk(data)
                    if chunk.get("error"):
                        outcome.error = error_message(data)
                        return
                    usage = chunk.get("usage") or usage
                    now = time.perf_counter()
                    if chunk.get("choices"):
                        outcome.latency = now - outcome.start
                    text = _text(chunk)
                    pieces.append(text)
                    outcome.token_ids += _ids(chunk) or ()
                    if new := _tokens(chunk, text):
                        if last is None:
                            outcome.ttft = now - outcome.start
                        else:
                            outcome.itls.append(now - last)
                        last = now
                        tokens += new
        outcome.text = "".join(pieces)
        outcome.input_tokens = usage.get("prompt_tokens", 0)
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        outcome.output_tokens = usage.get("completion_tokens", tokens)
        if last is None:
            outcome.ttft = outcome.latency
        if not done:
            outcome.error = "the stream ended without [DONE]"


async def run_load(
    target: Target,
    work: Sequence[BenchRequest | Conversation],
    load: Load,
    on_done: Callable[[Outcome], object],
) -> tuple[list[Outcome], float]:
    """Every request's outcome, in their order, and the seconds from the first one's start to the last one's end.

    A conversation arrives as one; its turns follow each other, and end with the first that fails.
    """
    room: AbstractAsyncContextManager[Any] = nullcontext()
    if load.max_concurrency is not None:
        room = asyncio.Semaphore(load.max_concurrency)
    began = time.perf_counter()

    async def one(work: BenchRequest | Conversation, due: float) -> list[Outcome]:
        await asyncio.sleep(began + due - time.perf_counter())
        outcomes: list[Outcome] = []
        before: BenchRequest | None = None
        turns, pauses = (work.turns, work.pauses) if isinstance(work, Conversation) else ([work], [0.0])
        for turn, pause in zip(turns, pauses, strict=True):
            await asyncio.sleep(pause)
            request = turn if before is None else _next_turn(before, outcomes[-1], turn)
            async with room:
                outcome = await target.send(request)
            if len(turns) > 1 and not isinstance(turn.prompt, str) and outcome.output_tokens > len(outcome.token_ids):
                outcome.error = outcome.error or f"the server gives no token ids; conversations need --endpoint {CHAT}"
            on_done(outcome)
            outcomes.append(outcome)
            if outcome.error is not None:
                break
            before = request
        return outcomes

    async with asyncio.TaskGroup() as tasks:
        due = load.arrivals(len(work))
        running = [tasks.create_task(one(each, t)) for each, t in zip(work, due, strict=True)]
    return [outcome for task in running for outcome in task.result()], time.perf_counter() - began


def _next_turn(before: BenchRequest, outcome: Outcome, turn: BenchRequest) -> BenchRequest:
    """`turn` after what was asked before it and the answer to that."""
    said, new = before.prompt, turn.prompt
    if isinstance(new, str):  # of a chat
        asked = [{"role": "user", "content": said}] if isinstance(said, str) else said
        answered = [{"role": "assistant", "content": outcome.text}, {"role": "user", "content": new}]
        return BenchRequest([*asked, *answered], turn.output_len)
    return BenchRequest([*said, *outcome.token_ids, *new], turn.output_len)


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise HttpError(f"an event is not a JSON object: {data[:80]!r}")
    return chunk


def _text(chunk: dict[str, Any]) -> str:
    """What a chunk adds, thoughts included."""
    choices = chunk.get("choices")
    if not choices:
        return ""
    delta = choices[0].get("delta") or {}
    return choices[0].get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def _tokens(chunk: dict[str, Any], text: str) -> int:
    """How many tokens a chunk brings. A server that does not say is taken to send one with each piece of text."""
    ids = _ids(chunk)
    return int(bool(text)) if ids is None else len(ids)


def _ids(chunk: dict[str, Any]) -> list[int] | None:
    choices = chunk.get("choices")
    ids = choices[0].get("token_ids") if choices else None
    return ids if isinstance(ids, list) else None
