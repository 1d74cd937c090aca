"""Reading answers and data files, and scoring."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thalweg.core import SamplingParams
from thalweg.errors import ConfigError
from thalweg.evals.arith import arith_task
from thalweg.evals.arith_problems import problems
from thalweg.evals.gsm8k import few_shot_questions, gsm8k_task, read_examples
from thalweg.evals.offline import evaluate_offline
from thalweg.evals.runner import Question, Task, last_number
from thalweg.text.results import CompletionOutput, RequestMetrics, RequestOutput


class EchoLLM:
    """Answers each prompt with the text that `answer` gives for it."""

    def __init__(self, answer: Any) -> None:
        self._answer, self.prompts, self.params = answer, [], None
        self.codec = SimpleNamespace(chat_ids=lambda messages: [messages])

    def generate(self, prompts: list[Any], params: SamplingParams, on_finished: Any) -> list[RequestOutput]:
        self.prompts, self.params = prompts, params
        outputs = []
        for prompt in prompts:
            text = self._answer(prompt)
            error = "broken" if text == "ERROR" else None
            output = CompletionOutput(text=text, token_ids=[1, 2, 3])
            outputs.append(RequestOutput("", None, [], [output], RequestMetrics(0.0), error=error))
            on_finished(outputs[-1])
        return outputs


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("5 apples and 3. #### 8\nQuestion", "8"),
        ("#### 3 then #### 4", "4"),
        ("#### $1,250.50", "1250.5"),
        ("#### -7", "-7"),
        ("The answer is 42.", "42"),
        ("so it is 1,319 dollars", "1319"),
        ("9-4", "4"),
        ("9 - 4 = -5", "-5"),
        ("x=-2", "-2"),
        ("no number", None),
        ("", None),
        ("#### none, but 6", "6"),
        ("18.00", "18"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_score_counts_right_invalid_and_failed() -> None:
    answers = {"a": "it is 1", "b": "it is 3", "c": "nothing", "d": "ERROR"}
    ended: list[int] = []
    task = Task([Question(p, p, Decimal(1)) for p in answers], last_number, 8)
    score = evaluate_offline(EchoLLM(answers.get), task, lambda: ended.append(1))
    assert (score.num_questions, score.accuracy, score.invalid, score.errors) == (4, 0.25, 0.5, 1)
    assert score.accuracy_error == pytest.approx((0.25 * 0.75 / 4) ** 0.5)
    assert score.output_tokens == 12
    assert score.output_throughput == pytest.approx(12 / score.latency_s)
    assert [(r.question, r.given, r.correct) for r in score.results] == [
        ("a", "1", True),
        ("b", "3", False),
        ("c", None, False),
        ("d", None, False),
    ]
    assert score.results[3].error == "broken"
    assert len(ended) == 4


def test_arith_asks_held_out_problems_in_the_chat_layout() -> None:
    expected = {p.question: p for p in problems("eval", 3, 20)}
    llm = EchoLLM(lambda ids: expected[ids[0][0]["content"]].answer_text)
    task = arith_task(20, 3, 64)
    score = evaluate_offline(llm, task)
    assert (score.accuracy, score.invalid) == (1.0, 0.0)
    assert llm.params.temperature == 0
    assert llm.params.max_tokens == 64
    assert evaluate_offline(EchoLLM(lambda _: "#### 0"), task).accuracy == 0
    assert evaluate_offline(EchoLLM(lambda _: "17"), task).invalid == 1


def write_lines(path: Path, count: int) -> str:
    lines = (json.dumps({"question": f"What is {i} + 1?", "answer": f"It is\n#### {i + 1}"}) for i in range(count))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_gsm8k_shots_come_first_and_are_never_asked(tmp_path: Path) -> None:
    examples = read_examples(write_lines(tmp_path / "d.jsonl", 9), 6)
    assert len(examples) == 6
    questions = few_shot_questions(examples, 2)
    assert [q.answer for q in questions] == [3, 4, 5, 6]
    assert questions[0].prompt == (
        "Question: What is 0 + 1?\nAnswer: It is\n#### 1\n\n"
        "Question: What is 1 + 1?\nAnswer: It is\n#### 2\n\n"
        "Question: What is 2 + 1?\nAnswer:"
    )
    llm = EchoLLM(lambda prompt: str(int(prompt.rsplit("What is ", 1)[1].split()[0]) + 1))
    assert evaluate_offline(llm, gsm8k_task(examples, 2, 32)).accuracy == 1
    assert llm.params.stop == ("Question",)
    with pytest.raises(ConfigError, match="--num-shots"):
        gsm8k_task(examples, 6, 32)


@pytest.mark.parametrize(
    "content",
    [
        b"not json\n",
        b"[1]\n",
        b'{"question": "q"}\n',
        b'{"question": "q", "answer": 3}\n',
        b'{"question": "", "answer": "1"}\n',
        b'{"question": "q", "answer": "none"}\n',
        b"\xff\xfe\n",
        b"[" * 100_000,
        b"x" * (2 << 20),
    ],
)
def test_a_damaged_data_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--data-path is .* line 1") as e:
        read_examples(str(path), 5)
    assert "\n" not in str(e.value)


def test_a_missing_data_file_names_the_option(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="--data-path"):
            read_examples(str(path), 5)


def test_the_published_file_is_read(shared_dir: Path) -> None:
    examples = read_examples(str(shared_dir / "data" / "gsm8k_test.jsonl"), 10_000)
    assert len(examples) == 1319
    assert [e.answer for e in examples[:3]] == [18, 3, 70000]
