"""One step's token choice for every row that samples, with parameters kept per slot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.core import Admission, TokenLogprobs
from thalweg.errors import InvalidRequest
from thalweg.sampling.adjust import LogitAdjuster
from thalweg.sampling.choose import sample_filtered
from thalweg.sampling.grammars import Grammars
from thalweg.sampling.logprobs import token_logprobs
from thalweg.sampling.structured import Structured
from thalweg.sampling.uniform import uniform

NON_FINITE = "the model gave non-finite logits for this request"


class Sampler:
    """Tables are indexed by slot; a slot's row is rewritten when a request is admitted to it.

    A row's token depends on its logits, its parameters, its seed and its position, never on its neighbours.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        device: torch.device,
        sample: Callable[..., Tensor],
        grammars: Grammars | None = None,
    ) -> None:
        """`grammars` are for the rank whose tokens count."""
        self._sample = sample  # op "sample"
        self.vocab_size, self.eos_token_ids, self.device = vocab_size, eos_token_ids, device
        n = num_slots + 1
        self._temperature = torch.ones(n, device=device)
        self._top_p = torch.ones(n, device=device)
        self._min_p = torch.zeros(n, device=device)
        self._top_k = torch.zeros(n, dtype=torch.int64, device=device)
        self._seed = torch.zeros(n, dtype=torch.int64, device=device)
        self._plain: set[int] = set()
        self._filtered: set[int] = set()
        self._adjusters: dict[int, LogitAdjuster] = {}
        self._logprobs: dict[int, int] = {}
        self._rejected: dict[int, str] = {}
        self._structured = Structured(grammars, vocab_size)

    def admit(self, a: Admission) -> None:
        p, slot = a.params, a.slot
        self._temperature[slot], self._top_p[slot], self._min_p[slot] = p.temperature, p.top_p, p.min_p
        self._top_k[slot] = max(p.top_k, 0)
        self._seed[slot] = a.seed - 2**64 if a.seed >= 2**63 else a.seed
        filtered = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
        _set(self._plain, slot, p.temperature > 0 and not filtered)
        _set(self._filtered, slot, p.temperature > 0 and filtered)
        self._adjusters.pop(slot, None)
        self._logprobs.pop(slot, None)
        self._rejected.pop(slot, None)
        if p.logprobs is not None:
            self._logprobs[slot] = p.logprobs
        if LogitAdjuster.needed(p):
            prompt, output = a.token_ids[: a.num_prompt], a.token_ids[a.num_prompt :]
            try:
                self._adjusters[slot] = LogitAdjuster(
                    p, prompt, output, self.eos_token_ids, self.vocab_size, self.device
                )
            except InvalidRequest as e:
                self._rejected[slot] = str(e)
            except Exception as e:  # noqa: BLE001 -- one request's parameters must not end the others'
                self._rejected[slot] = f"its sampling parameters could not be applied: {type(e).__name__}: {e}"
        try:
            self._structured.admit(a)
        except InvalidRequest as e:
            self._rejected[slot] = str(e)
        except Exception as e:  # noqa: BLE001 -- likewise
            self._rejected[slot] = f"its grammar could not be used: {type(e).__name__}: {e}"

    def __call__(
        self, logits_RV: Tensor, slots: list[int], positions: list[int]
    ) -> tuple[Tensor, dict[int, TokenLogprobs], dict[int, str]]:
        """Ids int64 [R] on the device, and per slot the log-probabilities asked for and the errors met.

        `positions` are those of the tokens being chosen. The id of a row with an error means nothing.
        """
        errors = {s: self._rejected[s] for s in slots if s in self._rejected} if self._rejected else {}
        masks = None
        if self._structured:  # before anything waits for the logits
            try:
                masks = self._structured.masks(slots)
            except Exception as e:  # noqa: BLE001 -- theirs alone must end
                broken = f"the grammar could not be applied: {type(e).__name__}: {e}"
                errors |= {slot: broken for slot in slots if slot in self._structured}
        # A sum is finite only where every term is (float64 cannot overflow on float32 terms), and is one pass.
        if not torch.isfinite(logits_RV.sum(dtype=torch.float64)):
            for row in torch.nonzero(~torch.isfinite(logits_RV).all(-1)).flatten().tolist():
                errors[slots[row]] = NON_FINITE
            logits_RV = torch.nan_to_num(logits_RV, nan=0.0, posinf=0.0, neginf=0.0)

        raw_RV = logits_RV
        adjusted = [r for r, s in enumerate(slots) if s in self._adjusters] if self._adjusters else []
        if adjusted or masks is not None:
            logits_RV = logits_RV.clone()
            for r in adjusted:
                try:
                    self._adjusters[slots[r]].apply(logits_RV[r])
                except Exception as e:  # noqa: BLE001 -- likewise
                    errors[slots[r]] = f"its logits could not be adjusted: {type(e).__name__}: {e}"
            if masks is not None:
                masks.apply(logits_RV)
                errors |= masks.errors

        ids_R = self._choose(logits_RV, slots, positions)
        for r in adjusted:
            self._adjusters[slots[r]].count(ids_R[r])

        logprobs: dict[int, TokenLogprobs] = {}
        if self._logprobs:
            wanted = [r for r, s in enumerate(slots) if s in self._logprobs]
            if wanted:
                top = max(self._logprobs[slots[r]] for r in wanted)
                for r, entry in zip(wanted, token_logprobs(raw_RV[wanted], ids_R[wanted], top), strict=True):
                    k = self._logprobs[slots[r]]
                    logprobs[slots[r]] = TokenLogprobs(
                        entry.token_id, entry.logprob, entry.rank, entry.top_ids[:k], entry.top_logprobs[:k]
                    )
        return ids_R, logprobs, errors

    def sampled(self, slots: list[int], read: Callable[[], list[int]]) -> None:
        """Tell where the ids that __call__ gave for `slots` can be read once they count: read() waits for them."""
        if self._structured:
            self._structured.sampled(slots, read)

    def simple(self, slots: list[int]) -> bool:
        """Whether `sample_rows` alone serves these slots: greedy or plain temperature, nothing to report or refuse."""
        special = (self._filtered, self._adjusters, self._logprobs, self._rejected, self._structured)
        return not any(special) or not any(slot in table for table in special if table for slot in slots)

    def sample_rows(self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor) -> Tensor:
        """Ids int64 [R] of greedy and plain rows, all on the device; -1 for a row with a non-finite logit."""
        return self._sample(logits_RV, self._temperature, self._seed, positions_R, slots_R, check=True)

    def _choose(self, logits_RV: Tensor, slots: list[int], positions: list[int]) -> Tensor:
        filtered = [r for r, s in enumerate(slots) if s in self._filtered] if self._filtered else []
        plain = [r for r, s in enumerate(slots) if s in self._plain] if self._plain else []
        ids_R = logits_RV.argmax(-1)
        for rows in (plain, filtered):
            if not rows:
                continue
            # The same computation for a row whatever its neighbours are: each kind has one way of drawing.
            index = torch.tensor(rows, device=self.device)
            slot = torch.tensor([slots[r] for r in rows], device=self.device)
            position = torch.tensor([positions[r] for r in rows], device=self.device)
            chosen_RV, temperature, seed = logits_RV[index], self._temperature[slot], self._seed[slot]
            if rows is plain:
                ids_R[index] = self._sample(chosen_RV, temperature, seed, position)
            else:
                filters = (self._top_k[slot], self._top_p[slot], self._min_p[slot])
                ids_R[index] = sample_filtered(chosen_RV, temperature, *filters, uniform(seed, position))
        return ids_R


def _set(group: set[int], slot: int, member: bool) -> None:
    (group.add if member else group.discard)(slot)
