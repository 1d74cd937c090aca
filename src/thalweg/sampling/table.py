"""How the tokens of each slot are chosen: parameters on the device, and what the host has to do by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thalweg.core import Admission
from thalweg.errors import InvalidRequest
from thalweg.sampling.adjust import LogitAdjuster
from thalweg.sampling.grammars import Grammars
from thalweg.sampling.structured import GrammarState
from thalweg.sampling.thinking import ThinkingState


@dataclass(slots=True)
class SlotSampling:
    """What the host knows of the choice of a slot's tokens."""

    draw: Literal["greedy", "plain", "filtered"] = "greedy"  # plain: by temperature alone
    logprobs: int | None = None  # to be reported, with this many most likely tokens
    adjuster: LogitAdjuster | None = None
    grammar: GrammarState | None = None
    thinking: ThinkingState | None = None
    rejected: str | None = None  # why the request cannot go on

    @property
    def special(self) -> bool:
        """Whether the op "sample" alone does not serve the slot."""
        return (
            self.draw == "filtered"
            or self.logprobs is not None
            or self.adjuster is not None
            or self.grammar is not None
            or self.thinking is not None
            or self.rejected is not None
        )


class SamplingTable:
    """Indexed by slot; a slot's row is rewritten when a request is admitted to it. Row 0 is the sink's.

    `temperature`, `top_p`, `min_p` (float32) and `top_k`, `seed` (int64) are [num_slots + 1] on the device.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        *,
        device: torch.device,
        eos_token_ids: frozenset[int] = frozenset(),
        grammars: Grammars | None = None,
    ) -> None:
        """`grammars` are for the rank whose tokens count."""
        self.vocab_size, self.device = vocab_size, device
        self._eos_token_ids, self._grammars = eos_token_ids, grammars
        n = num_slots + 1
        self._reals = torch.ones(3, n, device=device)
        self._integers = torch.zeros(2, n, dtype=torch.int64, device=device)
        self.temperature, self.top_p, self.min_p = self._reals.unbind(0)
        self.top_k, self.seed = self._integers.unbind(0)
        self.rows = [SlotSampling() for _ in range(n)]
        self.special: set[int] = set()  # the slots whose rows are

    def admit(self, admissions: Sequence[Admission]) -> tuple[np.ndarray, np.ndarray]:
        """Take in a step's admissions. What is to be `write`n of them on the device: reals float32 [3, n] and integers
        int64 [2, n]. Nothing here waits for the device unless a request adjusts its logits."""
        for a in admissions:
            self.rows[a.slot] = row = self._row(a)
            (self.special.add if row.special else self.special.discard)(a.slot)
        params = [a.params for a in admissions]
        reals = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
        integers = [
            [max(p.top_k, 0) for p in params],
            [a.seed - 2**64 if a.seed >= 2**63 else a.seed for a in admissions],
        ]
        return np.array(reals, dtype=np.float32), np.array(integers, dtype=np.int64)

    def write(self, slots: Tensor, reals: Tensor, integers: Tensor) -> None:
        """What `admit` gave, all on the device, for slots int64 [n]."""
        self._reals.index_copy_(1, slots, reals)
        self._integers.index_copy_(1, slots, integers)

    def _row(self, a: Admission) -> SlotSampling:
        p = a.params
        row = SlotSampling(logprobs=p.logprobs)
        if p.temperature > 0:
            row.draw = "filtered" if p.top_k > 0 or p.top_p < 1 or p.min_p > 0 else "plain"
        ids = a.token_ids if LogitAdjuster.needed(p) or p.thinking or p.grammar else []
        prompt, output = ids[: a.num_prompt], ids[a.num_prompt :]
        if LogitAdjuster.needed(p):
            try:
                row.adjuster = LogitAdjuster(p, prompt, output, self._eos_token_ids, self.vocab_size, self.device)
            except InvalidRequest as e:
                row.rejected = str(e)
            except Exception as e:  # noqa: BLE001 -- one request's parameters must not end the others'
                row.rejected = f"its sampling parameters could not be applied: {type(e).__name__}: {e}"
        if p.thinking is not None:
            row.thinking = ThinkingState(p.thinking, output, counts=self._grammars is not None)
        if p.grammar is not None:
            row.grammar = GrammarState()
            if self._grammars is not None:
                try:
                    row.grammar.begin(self._grammars.matcher(p.grammar), output)
                except InvalidRequest as e:
                    row.rejected = str(e)
                except Exception as e:  # noqa: BLE001 -- likewise
                    row.rejected = f"its grammar could not be used: {type(e).__name__}: {e}"
        return row
