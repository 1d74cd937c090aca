"""From token ids to text: detokenises each request's updates, finds stop strings, and keeps what was generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from thalweg.core import FinishReason, Request, RequestUpdate, TokenLogprobs
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.detokenizer import IncrementalDetokenizer


@dataclass(slots=True)
class Delta:
    """What one update added to a request's output. `finish_reason` is set on the last one only."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the token id or string that stopped it; None for eos
    error: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    prompt_logits: Any = None
    events: list[Any] | None = None  # what the request's TextReader made of the text; None without one
    num_cached_tokens: int = 0  # told with the first token: prompt tokens that came from the prefix cache
    sent_at: float | None = None  # when another process sent it, on time.monotonic's clock


class TextReader(Protocol):
    """Takes one request's text apart, and finds the request's stop strings in the part that they are about."""

    @property
    def marks(self) -> Mapping[int, str]:
        """Tokens that it sees as characters of their own (IncrementalDetokenizer)."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text."""

    def feed(self, text: str, *, last: bool = False) -> list[Any]:
        """What came of more text. `last`: nothing more comes, so that what was held back comes too."""


@dataclass(slots=True)
class _Tracked:
    detokenizer: IncrementalDetokenizer | None
    reader: TextReader | None
    include_stop: bool
    held: list[int] | None  # ids whose text comes at the end; None: text comes with each update


class OutputProcessor:
    """Keeps one entry a live request. An update for a request that ended here, by a stop string, is dropped."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int], *, late: bool = False) -> None:
        """With `late`, a request's text comes with its last delta, unless stop strings have to be watched for: for
        callers that show nothing before the end."""
        self._tokenizer, self._eos, self._late = tokenizer, eos_token_ids, late
        self._live: dict[str, _Tracked] = {}

    def add(self, request: Request, reader: TextReader | None = None) -> None:
        """Begin a request's output. With a `reader`, stop strings are left to it, and deltas have its events."""
        p, detokenizer = request.params, None
        if self._tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer,
                skip_special_tokens=p.skip_special_tokens,
                stop=p.stop if reader is None else (),
                include_stop_str_in_output=p.include_stop_str_in_output,
                marks=None if reader is None else reader.marks,
            )
        held: list[int] | None = [] if self._late and not p.stop else None
        self._live[request.id] = _Tracked(detokenizer, reader, p.include_stop_str_in_output, held)

    @property
    def waiting(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live)

    def discard(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def process(self, update: RequestUpdate) -> Delta | None:
        """The delta of one update, or None if its request is gone. When `stop_reason` is a string, the engine does
        not know yet that the request ended: the caller aborts it there.
        """
        tracked = self._live.get(update.request_id)
        if tracked is None:
            return None
        delta = Delta(
            update.request_id,
            "",
            update.token_ids,
            update.finish_reason,
            None if update.stop_token_id in self._eos else update.stop_token_id,
            update.error,
            update.logprobs,
            update.prompt_logprobs,
            update.prompt_logits,
            num_cached_tokens=update.num_cached_tokens,
        )
        if (detokenizer := tracked.detokenizer) is not None:
            # The token that ended it is reported, but is text only where that is asked for.
            cut = update.finish_reason == "stop" and not tracked.include_stop
            ids = update.token_ids[:-1] if cut else update.token_ids
            if (held := tracked.held) is not None:
                held += ids
                if update.finish_reason is None:
                    return delta
                ids = held
            delta.text = detokenizer.push(ids)
            if detokenizer.matched_stop is None and update.finish_reason is not None:
                delta.text += detokenizer.flush()
            matched = detokenizer.matched_stop
            if (reader := tracked.reader) is not None:
                delta.events = reader.feed(delta.text, last=update.finish_reason is not None)
                matched = reader.matched_stop
            if matched is not None and update.finish_reason != "error":
                delta.finish_reason, delta.stop_reason = "stop", matched
        if delta.finish_reason is not None:
            del self._live[update.request_id]
        return delta
