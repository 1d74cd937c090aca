"""The held-out arithmetic problems, asked as a user would ask them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from thalweg.core import SamplingParams
from thalweg.evals.arith_problems import final_answer, problems
from thalweg.evals.runner import Question, Score, score_questions

if TYPE_CHECKING:
    from thalweg.engine.llm import LLM


def evaluate_arith(
    llm: LLM, num_questions: int, seed: int, max_new_tokens: int, advance: Callable[[], object] = lambda: None
) -> Score:
    """Greedy answers to `num_questions` problems of the evaluation split, through the model's chat template."""
    questions = [
        Question(llm.codec.chat_ids([{"role": "user", "content": problem.question}]), problem.answer)
        for problem in problems("eval", seed, num_questions)
    ]
    params = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    return score_questions(llm, questions, params, final_answer, advance)
