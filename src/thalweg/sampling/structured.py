"""Rows whose tokens a grammar or a budget of reasoning has to allow: the masks that go over their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thalweg.sampling.thinking import Read, ThinkingState

if TYPE_CHECKING:
    import llguidance


@dataclass(frozen=True, slots=True)
class Masks:
    """int32 [rows, words] of bits, lowest first, for some rows of a step; `errors` by row if a grammar gave up."""

    rows: list[int]
    bits_RW: Tensor
    errors: dict[int, str]

    def apply(self, logits_RV: Tensor) -> None:
        """Set what is not allowed to -inf, in place."""
        index = torch.tensor(self.rows, device=logits_RV.device)
        logits_RV[index] = _masked(logits_RV[index], self.bits_RW.to(logits_RV.device))


class GrammarState:
    """How far one request is in its grammar. Without a matcher (before `begin`, or on a rank whose tokens do not
    count) nothing is masked."""

    def __init__(self) -> None:
        self.matcher: llguidance.LLMatcher | None = None
        self._last: tuple[Read, int] | None = None

    def begin(self, matcher: llguidance.LLMatcher, output: Sequence[int]) -> None:
        """Mask by `matcher` from now on, which is the request's own; `output` is what it has generated so far."""
        for token in output:
            _consume(matcher, token)
        self.matcher = matcher

    def sampled(self, read: Read, i: int) -> None:
        """Take note of where the token just chosen will be: read()[i]."""
        self._last = read, i

    def catch_up(self) -> None:
        """Take in the token noted last; waits until it is known."""
        if self.matcher is not None and self._last is not None:
            read, i = self._last
            self._last = None
            _consume(self.matcher, read()[i])


class Masker:
    """Makes the masks of a step's rows. A row's mask follows from its last token, which is asked for when the next
    step's model is on the device already, so that the device has work while the host waits and the grammar thinks.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._executor: llguidance.LLExecutor | None = None

    def masks(
        self, grammars: Sequence[tuple[int, GrammarState]], thinking: Sequence[tuple[int, ThinkingState]] = ()
    ) -> Masks | None:
        """What grammars (row, state) and budgets of reasoning (row, state) allow next; None if that is everything."""
        masks = self._of_grammars(grammars)
        limited = [(r, state, state.closes()) for r, state in thinking]
        limited = [(r, state, closes) for r, state, closes in limited if closes or state.spent]
        if not limited:
            return masks
        masks = self._with_rows(masks, [r for r, _, _ in limited])
        for r, state, closes in limited:
            _limit(masks.bits_RW[masks.rows.index(r)], state, closes)
        return masks

    def _with_rows(self, masks: Masks | None, rows: list[int]) -> Masks:
        """`masks` with rows that allow everything for those of `rows` that it lacks."""
        if masks is None:
            masks = Masks([], self._words(0), {})
        more = [r for r in rows if r not in masks.rows]
        return Masks(masks.rows + more, torch.cat([masks.bits_RW, ~self._words(len(more))]), masks.errors)

    def _words(self, rows: int) -> Tensor:
        return torch.zeros(rows, -(-self._vocab_size // 32), dtype=torch.int32)

    def _of_grammars(self, grammars: Sequence[tuple[int, GrammarState]]) -> Masks | None:
        rows = [(r, grammar.matcher) for r, grammar in grammars if grammar.matcher is not None]
        if not rows:
            return None
        for _, grammar in grammars:
            grammar.catch_up()
        masks_RW = self._words(len(rows))
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
                errors[r] = f"the grammar cannot go on: {' '.join(matcher.get_error().split())[:200]}"
                masks_RW[i] = -1
        return Masks([r for r, _ in rows], masks_RW, errors)


def _masked(logits_RV: Tensor, masks_RW: Tensor) -> Tensor:
    """-inf where the bit of a column (32 per word, lowest first) is 0. A row that has nothing left, e.g. because
    min_tokens forbids the only token allowed, goes by its mask alone."""
    bits_RW32 = masks_RW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks_RW.device) & 1
    allowed_RV = bits_RW32.flatten(1)[:, : logits_RV.shape[1]].bool()
    masked_RV = logits_RV.masked_fill(~allowed_RV, -torch.inf)
    lost_R1 = masked_RV.isneginf().all(-1, keepdim=True)
    return torch.where(lost_R1 & allowed_RV, 0.0, masked_RV)


def _limit(words_W: Tensor, state: ThinkingState, closes: bool) -> None:
    """Leave only the closing mark, or all but the opening one, if that leaves something: a grammar may not allow the
    closing mark within a character, which then comes first."""
    token = state.end if closes else state.begin
    word, bit = token // 32, 1 << (token % 32)
    bit -= (bit >> 31) << 32  # int32 has no 2**31
    if closes:
        if int(words_W[word]) & bit:
            words_W.zero_()
            words_W[word] = bit
    elif int(words_W[word]) != bit or int(words_W.count_nonzero()) > 1:
        words_W[word] &= ~bit


def _consume(matcher: llguidance.LLMatcher, token: int) -> None:
    # After the end only further ends come: ignore_eos, or the row under way when the request ended.
    if not matcher.is_stopped():
        matcher.consume_token(token)
