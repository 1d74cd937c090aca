"""What changes one request's logits before a token is chosen: biases, penalties, tokens held back by min_tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from thalweg.core import SamplingParams
from thalweg.errors import InvalidRequest


class LogitAdjuster:
    """Keeps one request's token counts and applies its adjustments to a row of logits [V] float32, in place.

    Repetition penalty (CTRL, arXiv:1909.05858) looks at prompt and output; presence and frequency at the output.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: list[int],
        output: list[int],
        eos_token_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.num_output = len(output)
        if bad := [t for t in params.logit_bias if t >= vocab_size]:
            raise InvalidRequest(f"logit_bias names token id {bad[0]}; the vocabulary has {vocab_size}")
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self._ends = torch.tensor([t for t in sorted(ends) if t < vocab_size], dtype=torch.int64, device=device)
        self._counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)  # of the output
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # in prompt or output
        self._seen[torch.tensor(prompt + output, dtype=torch.int64, device=device)] = True
        if output:
            ids = torch.tensor(output, dtype=torch.int64, device=device)
            self._counts.index_add_(0, ids, torch.ones(len(output), device=device))

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return bool(
            params.logit_bias
            or params.min_tokens
            or params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
        )

    def apply(self, logits_V: Tensor) -> None:
        p = self.params
        if len(self._bias_ids):
            logits_V.index_add_(0, self._bias_ids, self._bias)
        if p.repetition_penalty != 1:
            scaled_V = torch.where(logits_V > 0, logits_V / p.repetition_penalty, logits_V * p.repetition_penalty)
            logits_V.copy_(torch.where(self._seen, scaled_V, logits_V))
        if p.presence_penalty or p.frequency_penalty:
            logits_V.sub_(p.frequency_penalty * self._counts + p.presence_penalty * (self._counts > 0))
        if self.num_output < p.min_tokens and len(self._ends):
            logits_V.index_fill_(0, self._ends, -torch.inf)

    def count(self, token_id: Tensor) -> None:
        """Take note of the token chosen (int64 [], on the device)."""
        self.num_output += 1
        index = token_id.reshape(1)
        self._counts.index_add_(0, index, torch.ones(1, device=index.device))
        self._seen.index_fill_(0, index, True)
