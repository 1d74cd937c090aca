"""GSM8K (arXiv:2110.14168) by few-shot completion, scored on the final number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from thalweg.errors import ConfigError
from thalweg.evals.runner import Question, Task, last_number

STOP = ("Question",)
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Example:
    question: str
    worked: str  # the answer as the file gives it, steps and all
    answer: Decimal


def read_examples(path: str, most: int) -> list[Example]:
    """The first `most` examples of a file of JSON lines. Raises ConfigError, naming --data-path, on any fault."""
    examples: list[Example] = []
    try:
        with Path(path).expanduser().open("rb") as file:
            number = 0
            while len(examples) < most and (line := file.readline(MAX_LINE_BYTES + 1)):
                number += 1
                if line.strip():
                    examples.append(_read_example(line, f"--data-path is {path!r}: line {number}"))
    except OSError as e:
        raise ConfigError(
            f"--data-path is {path!r}, which cannot be read: {e.strerror}; expected a file of JSON lines"
        ) from None
    return examples


def _read_example(line: bytes, where: str) -> Example:
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"{where} is longer than {MAX_LINE_BYTES} bytes; expected one question a line")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(
            f'{where} is not JSON; expected an object with "question" and "answer" on every line'
        ) from None
    question, worked = (entry.get("question"), entry.get("answer")) if isinstance(entry, dict) else (None, None)
    if not (isinstance(question, str) and question and isinstance(worked, str) and worked):
        raise ConfigError(f'{where} lacks a text "question" or "answer"; expected both on every line')
    answer = last_number(worked)
    if answer is None:
        raise ConfigError(f'{where}: its answer has no number; expected one after "####"')
    return Example(question, worked, answer)


def few_shot_questions(examples: Sequence[Example], num_shots: int) -> list[Question]:
    """The examples after the first `num_shots`, each behind those solved ones."""
    shots = "".join(f"Question: {e.question}\nAnswer: {e.worked}\n\n" for e in examples[:num_shots])
    asked = examples[num_shots:]
    return [Question(e.question, f"{shots}Question: {e.question}\nAnswer:", e.answer) for e in asked]


def gsm8k_task(examples: Sequence[Example], num_shots: int, max_new_tokens: int) -> Task:
    """Every example after the first `num_shots`, as a text to complete. Raises ConfigError when there is none."""
    questions = few_shot_questions(examples, num_shots)
    if not questions:
        raise ConfigError(
            f"--data-path has {len(examples)} examples and --num-shots {num_shots} takes them all; expected fewer shots"
        )
    return Task(questions, last_number, max_new_tokens, STOP)
