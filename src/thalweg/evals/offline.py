"""Answers of an engine in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from thalweg.core import SamplingParams
from thalweg.evals.runner import Reply, Score, Task, score

if TYPE_CHECKING:
    from thalweg.engine.llm import LLM
    from thalweg.text.results import RequestOutput


def evaluate_offline(llm: LLM, task: Task, advance: Callable[[], object] = lambda: None) -> Score:
    """Ask all questions, as many at once as the engine runs; `advance` is called as each one ends."""

    def ended(_: RequestOutput) -> None:
        advance()

    prompts = [q.prompt if isinstance(q.prompt, str) else llm.codec.chat_ids(q.prompt) for q in task.questions]
    params = SamplingParams(temperature=0, max_tokens=task.max_new_tokens, stop=task.stop)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, on_finished=ended)
    seconds = time.perf_counter() - began
    return score(task, [Reply(o.outputs[0].text, len(o.outputs[0].token_ids), o.error) for o in outputs], seconds)
