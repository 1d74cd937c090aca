"""Answers of an OpenAI-compatible server. What goes wrong with one question is that question's error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from thalweg.evals.runner import Question, Reply, Score, Task, score
from thalweg.http_client import HttpClient, HttpError, error_message

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0  # before a request is sent again; a Retry-After counts up to the latter


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for one answer, and how often to send a request again that was refused for now or got lost."""

    timeout_s: float = 600.0
    max_retries: int = 3


class _Refused(Exception):
    """An answer that is none. `wait_s` is what the server asks to wait; `again` whether asking again makes sense."""

    def __init__(self, reason: str, again: bool, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.wait_s = again, wait_s


class Examiner:
    """Asks one server's model, at most `parallel` questions at once. `retries` counts requests sent again."""

    def __init__(self, http: HttpClient, model: str, parallel: int, patience: Patience) -> None:
        self._http, self._model, self._patience = http, model, patience
        self._room = asyncio.Semaphore(parallel)
        self.retries = 0

    async def evaluate(self, task: Task, on_reply: Callable[[Reply], object] = lambda _: None) -> Score:
        """Ask all questions of the task; `on_reply` is called as each one ends."""

        async def one(question: Question) -> Reply:
            async with self._room:
                reply = await self._reply(self._body(task, question))
            on_reply(reply)
            return reply

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(question)) for question in task.questions]
        return score(task, [r.result() for r in running], time.perf_counter() - began)

    def _body(self, task: Task, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "temperature": 0, "max_tokens": task.max_new_tokens}
        if task.stop:
            body["stop"] = list(task.stop)
        return body | {"prompt" if isinstance(question.prompt, str) else "messages": question.prompt}

    async def _reply(self, body: dict[str, Any]) -> Reply:
        wait_s, left = FIRST_WAIT_S, self._patience.max_retries
        while True:
            try:
                async with asyncio.timeout(self._patience.timeout_s):
                    return await self._ask(body)
            except TimeoutError:
                return Reply(error=f"no answer within {self._patience.timeout_s:g} s")
            except _Refused as refused:
                if not refused.again or left == 0:
                    return Reply(error=str(refused))
                pause = wait_s if refused.wait_s is None else refused.wait_s
            except HttpError as lost:
                if left == 0:
                    return Reply(error=str(lost))
                pause = wait_s
            left, wait_s = left - 1, min(2 * wait_s, MAX_WAIT_S)
            self.retries += 1
            await asyncio.sleep(pause)

    async def _ask(self, body: dict[str, Any]) -> Reply:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        async with self._http.request("POST", path, body) as answer:
            content = await answer.read()
        if answer.status != 200:
            wait_s = _seconds(answer.header("retry-after"))
            raise _Refused(f"{answer.status}: {error_message(content)}", answer.status in RETRIED, wait_s)
        return _read(content)


def _read(content: bytes) -> Reply:
    """The text and token count of a whole answer, in either endpoint's form."""
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        usage = answer.get("usage")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _Refused(f"the answer is not a completion: {content[:80]!r}", again=False) from None
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    # Thoughts alone, or calls alone, leave no content.
    return Reply(text if isinstance(text, str) else "", tokens if type(tokens) is int else None)


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, a number of seconds or a date, as seconds from now; None if it is neither."""
    if retry_after is None:
        return None
    try:
        if retry_after.strip().isdecimal():
            seconds = float(retry_after)
        else:
            seconds = (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_WAIT_S)
