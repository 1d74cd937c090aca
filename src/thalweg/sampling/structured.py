"""Rows whose tokens a grammar has to allow: a matcher a slot, and the masks that go over their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thalweg.core import Admission
from thalweg.sampling.grammars import Grammars

if TYPE_CHECKING:
    import llguidance

Read = Callable[[], list[int]]  # the ids of a step, once they are known on the host


@dataclass(frozen=True, slots=True)
class Masks:
    """int32 [rows, words] of bits, lowest first, for some rows of a step; `errors` by slot where a grammar gave up."""

    rows: list[int]
    bits_RW: Tensor
    errors: dict[int, str]

    def apply(self, logits_RV: Tensor) -> None:
        """Set what is not allowed to -inf, in place."""
        index = torch.tensor(self.rows, device=logits_RV.device)
        logits_RV[index] = _masked(logits_RV[index], self.bits_RW.to(logits_RV.device))


class Structured:
    """Matchers by slot. A row's mask follows from its last token, which is asked for when the next step's model is on
    the device already, so that the device has work while the host waits and the grammar thinks.

    Without `grammars` slots are remembered and not masked: another rank's tokens count.
    """

    def __init__(self, grammars: Grammars | None, vocab_size: int) -> None:
        self._grammars, self._vocab_size = grammars, vocab_size
        self._matchers: dict[int, llguidance.LLMatcher | None] = {}
        self._last: dict[int, tuple[Read, int]] = {}  # where a slot's token of the last step will be
        self._executor: llguidance.LLExecutor | None = None

    def __contains__(self, slot: int) -> bool:
        return slot in self._matchers

    def __bool__(self) -> bool:
        return bool(self._matchers)

    def admit(self, a: Admission) -> None:
        """Forget the slot's last request and take in this one. Raises InvalidRequest, the slot being known then."""
        self._matchers.pop(a.slot, None)
        self._last.pop(a.slot, None)
        if a.params.grammar is None:
            return
        self._matchers[a.slot] = None
        if self._grammars is not None:
            matcher = self._grammars.matcher(a.params.grammar)
            for token in a.token_ids[a.num_prompt :]:
                _consume(matcher, token)
            self._matchers[a.slot] = matcher

    def sampled(self, slots: list[int], read: Read) -> None:
        """Take note of where the step's tokens will be: read()[i] is slot slots[i]'s."""
        for i, slot in enumerate(slots):
            if slot in self._matchers:
                self._last[slot] = read, i

    def masks(self, slots: list[int]) -> Masks | None:
        """What the grammars of `slots` allow next; None where none of them has one."""
        rows = [(r, m) for r, s in enumerate(slots) if (m := self._matchers.get(s)) is not None]
        if not rows:
            return None
        for r, matcher in rows:
            if (last := self._last.pop(slots[r], None)) is not None:
                read, i = last
                _consume(matcher, read()[i])
        masks_RW = torch.zeros(len(rows), -(-self._vocab_size // 32), dtype=torch.int32)
        if self._executor is None:
            import llguidance

            self._executor = llguidance.LLExecutor()
        self._executor.unsafe_compute_mask_ptr(
            [(matcher, i) for i, (_, matcher) in enumerate(rows)],
            masks_RW.data_ptr(),
            masks_RW.shape[1] * masks_RW.itemsize,
            len(rows),
        )
        errors: dict[int, str] = {}
        for i, (r, matcher) in enumerate(rows):
            if matcher.is_error():
                errors[slots[r]] = f"the grammar cannot go on: {' '.join(matcher.get_error().split())[:200]}"
                masks_RW[i] = -1
        return Masks([r for r, _ in rows], masks_RW, errors)


def _masked(logits_RV: Tensor, masks_RW: Tensor) -> Tensor:
    """-inf where the bit of a column (32 in a word, lowest first) is 0. A row that has nothing left, as where
    min_tokens forbids the only token allowed, goes by its mask alone."""
    bits_RW32 = masks_RW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks_RW.device) & 1
    allowed_RV = bits_RW32.flatten(1)[:, : logits_RV.shape[1]].bool()
    masked_RV = logits_RV.masked_fill(~allowed_RV, -torch.inf)
    lost_R1 = masked_RV.isneginf().all(-1, keepdim=True)
    return torch.where(lost_R1 & allowed_RV, 0.0, masked_RV)


def _consume(matcher: llguidance.LLMatcher, token: int) -> None:
    # After the end only further ends come: ignore_eos, or the row under way when the request ended.
    if not matcher.is_stopped():
        matcher.consume_token(token)
