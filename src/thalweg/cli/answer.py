"""One streamed answer and its figures, for `generate` and `chat`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thalweg.core import SamplingParams
from thalweg.errors import ThalwegError

if TYPE_CHECKING:
    from thalweg.engine.llm import LLM


@dataclass(slots=True)
class Answer:
    """What was generated, and how fast; times in seconds from the moment the prompt was handed over."""

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    ttft_s: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole time, the prompt's included."""
        return len(self.token_ids) / self.seconds if self.seconds > 0 else 0.0

    @property
    def figures(self) -> str:
        return (
            f"{self.prompt_tokens} prompt tokens, {len(self.token_ids)} generated, "
            f"{self.ttft_s:.3f} s to the first, {self.tokens_per_s:.1f} tokens/s"
        )


def stream_answer(
    llm: LLM, prompt_ids: list[int], params: SamplingParams, write: Callable[[str], object] = lambda _: None
) -> Answer:
    """Generate, handing each piece of text to `write` as it comes. Raises ThalwegError when the request fails."""
    answer = Answer(len(prompt_ids))
    began = time.perf_counter()
    for delta in llm.stream(prompt_ids, params):
        if delta.token_ids and not answer.token_ids:
            answer.ttft_s = time.perf_counter() - began
        answer.token_ids += delta.token_ids
        if delta.text:
            answer.text += delta.text
            write(delta.text)
        if delta.error is not None:
            raise ThalwegError(f"the request failed after {len(answer.token_ids)} tokens: {delta.error}")
        if delta.finish_reason is not None:
            answer.finish_reason = delta.finish_reason
    answer.seconds = time.perf_counter() - began
    return answer
