"""Clients of a soak test: good ones, which know what the answer is, and all other kinds."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from thalweg.bench.serve_data import BenchRequest, RandomPrompts
from thalweg.bench.serve_load import CHAT, COMPLETIONS, Target
from thalweg.errors import ThalwegError
from thalweg.http_client import Answer, HttpClient, HttpError, error_message
from thalweg.tokenizer.base import Tokenizer

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
WAIT_SECONDS = 300.0  # for one answer


@dataclass(frozen=True, slots=True)
class Case:
    """A request whose answer is the same every time, and that answer."""

    endpoint: str
    request: BenchRequest
    options: dict[str, Any]
    text: str = ""
    tokens: int = 0

    def target(self, http: HttpClient, model: str) -> Target:
        return Target(http, self.endpoint, model, self.options, WAIT_SECONDS)


def draw_cases(tokenizer: Tokenizer, count: int, max_model_len: int, seed: int) -> list[Case]:
    """Short and long prompts and answers; greedy ones, seeded ones, texts for chat."""
    draw = random.Random(seed)
    ids, texts = (RandomPrompts(tokenizer, seed, as_text=as_text) for as_text in (False, True))
    cases = []
    for i in range(count):
        long = i % 4 == 0
        prompt_len = draw.randint(max_model_len // 8, max_model_len // 3) if long else draw.randint(1, 48)
        # Answers far longer than their prompts are what outgrows the cache and is preempted.
        output_len = max_model_len // 6 if i % 4 == 1 else draw.randint(1, min(128, max_model_len // 4))
        chat = i % 5 == 4 and not long
        [request] = (texts if chat else ids).random(1, prompt_len, output_len, 0.0)
        options: dict[str, Any] = {"temperature": 0} if i % 3 else {"temperature": 0.8, "top_p": 0.9, "seed": i}
        if i % 2:
            options["ignore_eos"] = True
        cases.append(Case(CHAT if chat else COMPLETIONS, request, options))
    return cases


async def solo(http: HttpClient, model: str, case: Case) -> Case:
    """The case with its answer, from a server that has nothing else to do."""
    outcome = await case.target(http, model).send(case.request)
    if outcome.error is not None:
        raise ThalwegError(f"a request by itself failed: {outcome.error}")
    return Case(case.endpoint, case.request, case.options, outcome.text, outcome.output_tokens)


class Clients:
    """Sends requests of every kind until told to stop. `counts` is what became of them, `faults` what never may."""

    def __init__(self, http: HttpClient, model: str, cases: Sequence[Case], vocab_size: int, seed: int) -> None:
        self._http, self._model, self._cases, self._vocab_size = http, model, cases, vocab_size
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.stopping = False
        self._kinds: list[tuple[Callable[[], Awaitable[str]], int]] = [
            (self._stream, 30),
            (self._whole, 25),
            (self._together, 8),
            (self._other_api, 8),
            (self._leave_stream, 12),
            (self._leave_whole, 8),
            (self._bad, 12),
            (self._break_off, 5),
        ]

    async def run(self) -> None:
        """One client after another, until `stopping`."""
        work, weights = zip(*self._kinds, strict=True)
        while not self.stopping:
            [kind] = self._random.choices(work, weights)
            try:
                async with asyncio.timeout(WAIT_SECONDS + 30):
                    self.counts[await kind()] += 1
            except (HttpError, TimeoutError, OSError) as e:
                self.faults.append(f"{kind.__name__.strip('_')}: {type(e).__name__}: {e}")

    def fault(self, text: str) -> str:
        self.faults.append(text)
        return "faults"

    async def check_stream(self, case: Case) -> str:
        """One streamed request, held against its answer."""
        outcome = await case.target(self._http, self._model).send(case.request)
        if outcome.error is not None:
            return await self._refused(outcome.error) or self.fault(f"a stream failed: {outcome.error}")
        return self._same(case, outcome.text, outcome.output_tokens, "streamed")

    async def _stream(self) -> str:
        return await self.check_stream(self._random.choice(self._cases))

    async def _whole(self) -> str:
        case = self._random.choice(self._cases)
        status, content = await self._post(case.endpoint, self._body(case, stream=False))
        if status != 200:
            return await self._refused(f"{status}: ") or self.fault(f"an answer: {status}: {error_message(content)}")
        answer = json.loads(content)
        choice = answer["choices"][0]
        text = choice["message"]["content"] if case.endpoint == CHAT else choice["text"]
        return self._same(case, text, answer["usage"]["completion_tokens"], "whole")

    async def _together(self) -> str:
        """Two prompts in one request, and each twice over. It needs four places at once, so it asks for them again."""
        same = [c for c in self._cases if c.endpoint == COMPLETIONS and c.options == {"temperature": 0}]
        chosen = self._random.sample(same, min(2, len(same)))
        length = min(c.request.output_len for c in chosen)
        body = {"model": self._model, "prompt": [c.request.prompt for c in chosen], "n": 2, "max_tokens": length}
        status, content = await self._post(COMPLETIONS, {**body, "temperature": 0})
        while status == 429 and not self.stopping:
            self.counts[await self._refused(f"{status}: ")] += 1
            status, content = await self._post(COMPLETIONS, {**body, "temperature": 0})
        if status != 200:
            return await self._refused(f"{status}: ") or self.fault(f"prompts: {status}: {error_message(content)}")
        for i, choice in enumerate(json.loads(content)["choices"]):
            text, expected = choice["text"].rstrip("\ufffd"), chosen[i // 2].text
            if not expected.startswith(text):  # `length` may cut a character in half, at the end
                return self.fault(f"choice {i} of several prompts is {text[:60]!r}; expected {expected[:60]!r}")
        return "together"

    async def _other_api(self) -> str:
        """A chat's request in the form of another API, whose answer is the same."""
        chats = [c for c in self._cases if c.endpoint == CHAT and "ignore_eos" not in c.options]
        if not chats:
            return await self._whole()
        case = self._random.choice(chats)
        body = {"model": self._model, **case.options}
        turn = [{"role": "user", "content": case.request.prompt}]
        if self._random.random() < 0.5:
            path, body = MESSAGES, {**body, "messages": turn, "max_tokens": case.request.output_len}
        else:
            path, body = (
                RESPONSES,
                {**body, "input": turn, "max_output_tokens": case.request.output_len, "store": False},
            )
        status, content = await self._post(path, body)
        if status != 200:
            return await self._refused(f"{status}: ") or self.fault(f"{path}: {status}: {error_message(content)}")
        answer = json.loads(content)
        items = answer["content"] if path == MESSAGES else [p for item in answer["output"] for p in item["content"]]
        text = "".join(item["text"] for item in items if item["type"] in ("text", "output_text"))
        return self._same(case, text, answer["usage"]["output_tokens"], "other api")

    async def _leave_stream(self) -> str:
        case = self._random.choice(self._cases)
        events_read = self._random.randint(0, 8)
        async with self._http.request("POST", case.endpoint, self._body(case, stream=True)) as answer:
            if answer.status != 200:
                return await self._no(answer)
            async with aclosing(answer.events()) as events:
                async for _ in events:
                    events_read -= 1
                    if events_read < 0:
                        break
        return "left a stream"

    async def _leave_whole(self) -> str:
        case = self._random.choice(self._cases)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0, 0.5)):
                await self._post(case.endpoint, self._body(case, stream=False))
        return "left before the answer"

    async def _bad(self) -> str:
        case = self._random.choice(self._cases)
        ok = self._body(case, stream=self._random.random() < 0.5)
        prompt = "messages" if case.endpoint == CHAT else "prompt"
        path, body, expected = self._random.choice(
            [
                (case.endpoint, {**ok, "temperature": -1}, 400),
                (case.endpoint, {**ok, prompt: 7}, 400),
                (case.endpoint, {**ok, "n": 0}, 400),
                (case.endpoint, {**ok, "stop": [""]}, 400),
                (case.endpoint, {**ok, "stop_token_ids": [self._vocab_size]}, 400),
                (COMPLETIONS, {"model": self._model, "prompt": [self._vocab_size]}, 400),
                (COMPLETIONS, {"model": self._model, "prompt": [0] * 2_000_000}, 400),
                (case.endpoint, {**ok, "model": "another"}, 404),
                ("/v1/nothing", ok, 404),
                (MESSAGES, {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400),
                (RESPONSES, {"input": [{"type": "item_reference"}]}, 400),
                (RESPONSES, {"input": "x", "previous_response_id": "resp_none"}, 404),
                (COMPLETIONS, {"prompt": "x" * (11 << 20)}, 413),
            ]
        )
        status, content = await self._post(path, body)
        if status not in (expected, 429):
            return self.fault(f"a bad request got {status}, expected {expected}: {error_message(content)}")
        return "bad"

    async def _break_off(self) -> str:
        """Part of a request, or what is none, and then nothing."""
        body = json.dumps(self._body(self._random.choice(self._cases), stream=True)).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        whole = head + body
        sent = self._random.choice([whole[: self._random.randrange(len(whole))], b"\x16\x03\x01" * 9, b"", b"\r\n\r\n"])
        _, writer = await asyncio.open_connection(self._http.host, self._http.port)
        writer.write(sent)
        with suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(self._random.uniform(0, 0.2))
        writer.close()
        return "broke off"

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        async with self._http.request("POST", path, body) as answer:
            return answer.status, await answer.read()

    async def _no(self, answer: Answer) -> str:
        content = await answer.read()
        return await self._refused(f"{answer.status}: ") or self.fault(f"{answer.status}: {error_message(content)}")

    async def _refused(self, error: str) -> str:
        """ "refused" after a moment when the queue was full, which is not a fault; else ""."""
        if not error.startswith("429: "):
            return ""
        await asyncio.sleep(self._random.uniform(0.2, 1.0))
        return "refused"

    def _body(self, case: Case, *, stream: bool) -> dict[str, Any]:
        body = case.target(self._http, self._model).body(case.request)
        if not stream:
            del body["stream"], body["stream_options"]
        return body

    def _same(self, case: Case, text: str, tokens: int, kind: str) -> str:
        if (text, tokens) == (case.text, case.tokens):
            return kind
        at = next((i for i, (a, b) in enumerate(zip(text, case.text, strict=False)) if a != b), -1)
        return self.fault(
            f"a {kind} answer of {tokens} tokens differs at character {at} from its solo run of {case.tokens}:"
            f" {case.options}, prompt {str(case.request.prompt)[:60]}"
        )
