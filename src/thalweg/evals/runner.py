"""Asks a model many questions at once and scores what comes back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from thalweg.core import SamplingParams

if TYPE_CHECKING:
    from thalweg.engine.llm import LLM
    from thalweg.text.results import RequestOutput

_FINAL = re.compile(r"####\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")
# A minus counts where nothing stands before it that could be subtracted from: "5-3" holds 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt (text or token ids) and the number that answers it."""

    prompt: str | list[int]
    answer: Decimal | int


@dataclass(frozen=True, slots=True)
class Score:
    """`accuracy` and `invalid`, answers without a number, are shares; `errors` counts failed requests, invalid too."""

    num_questions: int
    accuracy: float
    invalid: float
    errors: int
    latency_s: float  # of all questions together
    output_tokens: int
    output_throughput: float  # generated tokens/s


def score_questions(
    llm: LLM,
    questions: Sequence[Question],
    params: SamplingParams,
    read_answer: Callable[[str], Decimal | int | None],
    advance: Callable[[], object],
) -> Score:
    """Answer all questions, as many at once as the engine runs, and compare; `advance` is called as each one ends."""

    def ended(_: RequestOutput) -> None:
        advance()

    began = time.perf_counter()
    outputs = llm.generate([q.prompt for q in questions], params, on_finished=ended)
    seconds = time.perf_counter() - began
    answers = [None if o.error is not None else read_answer(o.outputs[0].text) for o in outputs]
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    return Score(
        num_questions=len(questions),
        accuracy=sum(a == q.answer for a, q in zip(answers, questions, strict=True)) / len(questions),
        invalid=answers.count(None) / len(questions),
        errors=sum(o.error is not None for o in outputs),
        latency_s=seconds,
        output_tokens=tokens,
        output_throughput=tokens / seconds,
    )


def last_number(text: str) -> Decimal | None:
    """The number after the last `####`, or else the text's last number; None when it has none."""
    found = _FINAL.findall(text) or _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
