"""A stand-in for the engine's client: scripted tokens, real detokenisation, no process and no model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from thalweg.config.hf import GenerationConfig
from thalweg.core import Request, RequestUpdate, SamplingParams, SchedulerStats, TokenLogprobs
from thalweg.errors import EngineDeadError, InvalidRequest, QueueTimeout, RequestTimeout, ThalwegError
from thalweg.server.app import create_app
from thalweg.server.parsers.marks import MARK_OF
from thalweg.server.settings import ServerSettings
from thalweg.text.output import Delta, OutputProcessor, TextReader
from thalweg.text.prompts import check_params, check_token_ids
from thalweg.tokenizer.base import Tokenizer, literal_pattern, split_literals, valid_unicode
from thalweg.tokenizer.template import ChatTemplate

EOS = 256
ANSWER = "Hello, wörld!"


class ByteTokenizer(Tokenizer):
    """One token a byte, and the special token <eos>."""

    def __init__(self, more_specials: Sequence[str] = ()) -> None:
        self.special_tokens = {text: EOS + i for i, text in enumerate(["<eos>", *more_specials])}
        self.added_tokens = self.special_tokens
        self.eos_id = EOS
        self._special_ids = frozenset(self.special_tokens.values())
        self._bytes_by_id = [bytes([i]) for i in range(256)] + [text.encode() for text in self.special_tokens]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return list(valid_unicode(text).encode())
        pieces = split_literals(literal_pattern(self.special_tokens), valid_unicode(text))
        return [i for piece, special in pieces for i in ([self.special_tokens[piece]] if special else piece.encode())]


class ClientDouble:
    """Answers ANSWER and <eos>, whatever the prompt is, but for prompts that hold one of these words.

    FAIL: the request fails after two tokens. DIE: the engine is lost after two tokens. HANG: nothing comes after two
    tokens. STUCK: its grammar gives up after two tokens. QUEUED: nothing comes once it is taken in. REFUSE: the
    engine does not take it. WAITED, LATE: it waited or took too long. EXPIRED: so it did, after its stream began.
    """

    def __init__(
        self,
        generation: GenerationConfig | None = None,
        answer: str = ANSWER,
        template: str | None = None,
        cached: int = 0,
    ) -> None:
        """With a chat `template`, `answer` may have the markers of tool calls and reasoning, which are tokens then.
        `cached` tokens of each prompt are said to come from the prefix cache."""
        self.cached = cached
        tokenizer = ByteTokenizer(() if template is None else tuple(MARK_OF))
        self.answer = tokenizer.encode(answer, allow_special=template is not None)
        source = SimpleNamespace(
            name="double", folder=Path("models/double"), generation=generation or GenerationConfig()
        )

        def chat_ids(
            messages: list[dict[str, Any]], /, tools: Any, add_generation_prompt: bool, style: str = "", **_: Any
        ) -> list[int]:
            text = style + "".join(f"{m['role']}:{m['content']}\n" for m in messages)
            return tokenizer.encode(text + "assistant:" * add_generation_prompt)

        self.codec = SimpleNamespace(source=source, tokenizer=tokenizer, chat_ids=chat_ids, template=None)
        if template is not None:
            self.codec.template = ChatTemplate(template, tokenizer)
            self.codec.chat_ids = self.codec.template.encode_chat
        vocab_size = max(260, tokenizer.vocab_size)
        self.info = SimpleNamespace(
            name="double", max_model_len=1000, sequences_at_once=4, data_parallel_size=1, vocab_size=vocab_size
        )
        self.info.most_session_points = None
        self.kept: dict[str, list[int]] = {}
        self.stats: SchedulerStats | None = None
        self.rank_stats: dict[int, SchedulerStats] = {}
        self.profiler: Any = None
        self.dead: EngineDeadError | None = None
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.closed = False

    async def start(self) -> None:
        await self.may_start.wait()

    async def close(self) -> None:
        self.closed = True

    async def keep(self, name: str, salt: str, ids: list[int]) -> int:
        assert name not in self.kept
        self.kept[name] = ids
        return len(ids) // 2

    def release(self, name: str) -> None:
        del self.kept[name]

    async def generate(
        self, ids: list[int], params: SamplingParams, request_id: str, reader: TextReader | None = None
    ) -> AsyncIterator[Delta]:
        if self.dead is not None:
            raise self.dead
        check_token_ids(ids, self.info.vocab_size)
        check_params(params, self.codec.tokenizer, self.info.vocab_size)
        request = Request(id=request_id, prompt_token_ids=ids, params=params)
        self.seen.append(request)
        outputs = OutputProcessor(self.codec.tokenizer, frozenset({EOS}))
        outputs.add(request, reader)
        ended = False
        try:
            async for update in self._updates(request):
                delta = outputs.process(update)
                ended = delta.finish_reason is not None
                yield delta
                if ended:
                    return
        except ThalwegError:
            ended = True
            raise
        finally:
            if not ended:
                self.aborted.append(request_id)

    async def _updates(self, request: Request) -> AsyncIterator[RequestUpdate]:
        prompt, params, name = bytes(i for i in request.prompt_token_ids if i < 256), request.params, request.id
        if b"REFUSE" in prompt:
            raise InvalidRequest("the prompt has 9 tokens; expected at most 8 in all (--max-model-len)")
        yield RequestUpdate(name, [])
        if b"EXPIRED" in prompt:
            await asyncio.sleep(0.02)
        if b"WAITED" in prompt or b"EXPIRED" in prompt:
            raise QueueTimeout("the request waited for 1 s and was not begun (--queue-timeout)")
        if b"LATE" in prompt:
            raise RequestTimeout("the request has not ended after 1 s (--request-timeout)")
        if b"QUEUED" in prompt:
            await asyncio.Event().wait()
        if params.prompt_logprobs is not None:
            rest = [logprobs(i, params.prompt_logprobs) for i in request.prompt_token_ids[1:]]
            yield RequestUpdate(name, [], prompt_logprobs=rest[:2])
            if params.max_tokens != 0:
                yield RequestUpdate(name, [], prompt_logprobs=rest[2:])
            else:
                yield RequestUpdate(name, [], "length", prompt_logprobs=rest[2:])
                return
        if params.max_tokens == 0:
            yield RequestUpdate(name, [], "length")
            return
        for n, token in enumerate([*self.answer, EOS], start=1):
            await asyncio.sleep(0)
            if n == 3 and b"FAIL" in prompt:
                yield RequestUpdate(name, [], "error", error="logits are not finite")
                return
            if n == 3 and b"STUCK" in prompt:
                yield RequestUpdate(name, [], "error", error="the grammar cannot go on: too many items")
                return
            if n == 3 and b"DIE" in prompt:
                raise EngineDeadError("the engine process ended with exit code -9")
            if n == 3 and b"HANG" in prompt:
                await asyncio.Event().wait()
            entry = None if params.logprobs is None else logprobs(token, params.logprobs)
            if token == EOS:
                yield RequestUpdate(name, [token], "stop", token, logprobs=entry)
            else:
                reason = "length" if n == params.max_tokens else None
                cached = self.cached if n == 1 else 0
                yield RequestUpdate(name, [token], reason, logprobs=entry, num_cached_tokens=cached)


def logprobs(token: int, top: int) -> TokenLogprobs:
    """A chosen token that is the second most likely one."""
    ids = [(token + 1) % 256, token, (token + 2) % 256, (token + 3) % 256][:top]
    return TokenLogprobs(token, -1.5, 2, ids, [-0.5, -1.5, -2.5, -math.inf][:top])


@asynccontextmanager
async def serving(client: ClientDouble, settings: ServerSettings | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of an application over `client`, without sockets."""
    app = create_app(client, settings or ServerSettings())
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            http.app = app
            yield http


def run(work: Callable[[httpx.AsyncClient, ClientDouble], Awaitable[Any]], client: ClientDouble | None = None) -> Any:
    """Run `work` against a served double and return what it returns."""

    async def main() -> Any:
        double = client or ClientDouble()
        async with serving(double) as http:
            return await asyncio.wait_for(work(http, double), 10)

    return asyncio.run(main())
