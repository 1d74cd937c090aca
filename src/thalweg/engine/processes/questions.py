"""Questions to the engine process that one caller waits for an answer to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import thalweg.errors as errors
from thalweg.engine.processes import messages as m
from thalweg.errors import EngineDeadError, RequestTimeout, ThalwegError

Question = m.Keep | m.CountExperts | m.Give
Answer = m.Kept | m.ExpertsCounted | m.Obeyed
ANSWER_SECONDS = 240.0  # while ranks write the trace of a profile, nothing else is done


class Questions:
    """For one asyncio loop. Whatever becomes of the engine, no question waits for ever."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._open: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, post: Callable[[m.ToEngine], None], make: Callable[[int], Question]) -> Any:
        """Send what `make` gives for a new id and wait. Raises the error that comes for an answer, RequestTimeout, and
        what `lose` is called with."""
        question = make(next(self._ids))
        answer = self._open[question.id] = asyncio.get_running_loop().create_future()
        try:
            post(question)
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise RequestTimeout(f"the engine has not answered within {ANSWER_SECONDS:g} s") from None
        finally:
            del self._open[question.id]

    def take(self, message: Answer) -> None:
        answer = self._open.get(message.id)
        if answer is None or answer.done():
            return
        if isinstance(message, m.Kept | m.ExpertsCounted):
            answer.set_result(message.tokens)
        elif message.kind is None:
            answer.set_result(message.outcome)
        else:
            answer.set_exception(same_error(message.kind, message.reason, ThalwegError))

    def lose(self, error: EngineDeadError) -> None:
        """End every open question with `error`."""
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(error)


def same_error(name: str, reason: str, otherwise: type[ThalwegError]) -> ThalwegError:
    """The error of a class of thalweg.errors by its name, as another process raised it."""
    kind = getattr(errors, name, otherwise)
    if not (isinstance(kind, type) and issubclass(kind, ThalwegError)):
        kind = otherwise
    return kind(reason)
