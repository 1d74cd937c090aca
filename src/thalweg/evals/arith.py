"""The held-out arithmetic problems, asked as a user would ask them."""

from __future__ import annotations

from thalweg.evals.arith_problems import final_answer, problems
from thalweg.evals.runner import Question, Task


def arith_task(num_questions: int, seed: int, max_new_tokens: int) -> Task:
    """`num_questions` problems of the evaluation split, as chats."""
    questions = [
        Question(problem.question, [{"role": "user", "content": problem.question}], problem.answer)
        for problem in problems("eval", seed, num_questions)
    ]
    return Task(questions, final_answer, max_new_tokens)
