"""A task is questions with numbers for answers; its score is how many of the replies give the right one.

Who replies is another module's business: an engine in this process (`offline`), or a server (`server`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from math import sqrt
from typing import Any

_FINAL = re.compile(r"####\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")
# A minus counts where nothing stands before it that could be subtracted from: "5-3" holds 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt (text to complete, or chat messages) and the number that answers it. `text` is the question alone."""

    text: str
    prompt: str | Messages
    answer: Decimal | int


@dataclass(frozen=True, slots=True)
class Task:
    """Questions, answered greedily with at most `max_new_tokens` tokens each, up to a stop string."""

    questions: Sequence[Question]
    read_answer: Callable[[str], Decimal | int | None]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one question: a text, or an error. `tokens` is None if the server did not count them."""

    text: str = ""
    tokens: int | None = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One question of a score. `given` is the number read from `text`, None where there is none or no reply came."""

    question: str
    expected: str
    given: str | None
    correct: bool
    error: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """`accuracy` and `invalid`, answers without a number, are shares; `errors` counts failed requests, invalid too.

    `accuracy_error` is the standard error of `accuracy`. Token figures are None if some replies were not counted.
    """

    num_questions: int
    accuracy: float
    accuracy_error: float
    invalid: float
    errors: int
    latency_s: float  # of all questions together
    output_tokens: int | None
    output_throughput: float | None  # generated tokens/s
    results: list[Result]

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, without the single questions."""
        values = asdict(self)
        del values["results"]
        return values


def score(task: Task, replies: Sequence[Reply], seconds: float) -> Score:
    """Hold the replies, in the questions' order, against the answers. `seconds` is the time all of them took."""
    results = [_result(task, question, reply) for question, reply in zip(task.questions, replies, strict=True)]
    count, right = len(results), sum(r.correct for r in results)
    accuracy = right / count
    counted = [reply.tokens for reply in replies if reply.tokens is not None]
    tokens = sum(counted) if len(counted) == count else None
    return Score(
        num_questions=count,
        accuracy=accuracy,
        accuracy_error=sqrt(accuracy * (1 - accuracy) / count),
        invalid=sum(r.given is None for r in results) / count,
        errors=sum(r.error is not None for r in results),
        latency_s=seconds,
        output_tokens=tokens,
        output_throughput=None if tokens is None else tokens / seconds,
        results=results,
    )


def _result(task: Task, question: Question, reply: Reply) -> Result:
    given = None if reply.error is not None else task.read_answer(reply.text)
    return Result(
        question=question.text,
        expected=str(question.answer),
        given=None if given is None else str(given),
        correct=given == question.answer,
        error=reply.error,
        text=reply.text,
    )


def last_number(text: str) -> Decimal | None:
    """The number after the last `####`, or else the text's last number; None when it has none."""
    found = _FINAL.findall(text) or _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
