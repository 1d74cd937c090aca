"""What the offline API returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from thalweg.core import FinishReason, TokenLogprobs


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt. `token_ids` includes the token that ended it, `text` does not."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        return None if self.logprobs is None else sum(entry.logprob for entry in self.logprobs)


@dataclass(slots=True)
class RequestMetrics:
    """Seconds on time.perf_counter's clock."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its outputs. `error` is set if, and only if, the finish reason is "error"."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # the first token has none
    error: str | None = None
    num_cached_tokens: int = 0  # of the prompt, that came from the prefix cache

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)
