"""One step's token choice for every row that samples, by the parameters of its slot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.core import TokenLogprobs
from thalweg.sampling.choose import sample_filtered, uniform
from thalweg.sampling.logprobs import token_logprobs
from thalweg.sampling.structured import Masker, Masks
from thalweg.sampling.table import SamplingTable, SlotSampling

NON_FINITE = "the model gave non-finite logits for this request"


class Sampler:
    """A row's token depends on its logits, its parameters, its seed and its position, never on its neighbours."""

    def __init__(
        self, table: SamplingTable, sample: Callable[..., Tensor], over_ranks: Callable[..., Tensor] | None = None
    ) -> None:
        """Of ops "sample" and, if ranks divide the vocabulary, "sample_over_ranks" with the ranks given."""
        self.table = table
        self._sample, self._over_ranks = sample, over_ranks
        self._masker = Masker(table.vocab_size)

    def __call__(
        self, logits_RV: Tensor, slots: list[int], positions: list[int]
    ) -> tuple[Tensor, dict[int, TokenLogprobs], dict[int, str]]:
        """Ids int64 [R] on the device, and per slot the log-probabilities asked for and the errors met.

        `positions` are those of the tokens being chosen. The id of a row with an error means nothing.
        """
        rows = list(map(self.table.rows.__getitem__, slots))
        special = not self.simple(slots)
        errors: dict[int, str] = {}
        masks = None
        if special:
            errors = {r: row.rejected for r, row in enumerate(rows) if row.rejected is not None}
            masks = self._masks(rows, errors)  # before anything waits for the logits
        # A sum is finite only if every term is (float64 cannot overflow on float32 terms), and is one pass.
        if not torch.isfinite(logits_RV.sum(dtype=torch.float64)):
            for r in torch.nonzero(~torch.isfinite(logits_RV).all(-1)).flatten().tolist():
                errors[r] = NON_FINITE
            logits_RV = torch.nan_to_num(logits_RV, nan=0.0, posinf=0.0, neginf=0.0)

        raw_RV = logits_RV
        adjusted = [(r, row.adjuster) for r, row in enumerate(rows) if row.adjuster is not None] if special else []
        if adjusted or masks is not None:
            logits_RV = logits_RV.clone()
            for r, adjuster in adjusted:
                try:
                    adjuster.apply(logits_RV[r])
                except Exception as e:  # noqa: BLE001 -- theirs alone must end
                    errors[r] = f"its logits could not be adjusted: {type(e).__name__}: {e}"
            if masks is not None:
                masks.apply(logits_RV)
                errors |= masks.errors

        ids_R = self._choose(logits_RV, rows, slots, positions)
        for r, adjuster in adjusted:
            adjuster.count(ids_R[r])
        logprobs = _logprobs(raw_RV, ids_R, rows) if special else {}
        return ids_R, {slots[r]: entry for r, entry in logprobs.items()}, {slots[r]: e for r, e in errors.items()}

    def sampled(self, slots: list[int], read: Callable[[], list[int]]) -> None:
        """Tell where the ids that __call__ gave for `slots` can be read once they count: read() waits for them."""
        if not self.simple(slots):
            for i, slot in enumerate(slots):
                row = self.table.rows[slot]
                for state in (row.grammar, row.thinking):
                    if state is not None:
                        state.sampled(read, i)

    def simple(self, slots: list[int]) -> bool:
        """Whether `sample_rows` alone serves these slots: greedy or plain temperature, nothing to report or refuse."""
        special = self.table.special
        return not special or special.isdisjoint(slots)

    def sample_rows(self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor) -> Tensor:
        """Ids int64 [R] of greedy and plain rows, all on the device; -1 for a row with a non-finite logit."""
        return self._sample(logits_RV, self.table.temperature, self.table.seed, positions_R, slots_R, check=True)

    def sample_over_ranks(self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor) -> Tensor:
        """As `sample_rows`, of this rank's part of the logits."""
        assert self._over_ranks is not None
        return self._over_ranks(logits_RV, self.table.temperature, self.table.seed, positions_R, slots_R)

    def _masks(self, rows: list[SlotSampling], errors: dict[int, str]) -> Masks | None:
        """Masks of the rows that need one; if there can be none, every row that might ends in `errors`."""
        grammars = [(r, row.grammar) for r, row in enumerate(rows) if row.grammar is not None]
        thinking = [(r, row.thinking) for r, row in enumerate(rows) if row.thinking is not None]
        if not grammars and not thinking:
            return None
        try:
            return self._masker.masks(grammars, thinking)
        except Exception as e:  # noqa: BLE001 -- likewise
            broken = f"the grammar could not be applied: {type(e).__name__}: {e}"
            errors.update((r, broken) for r, _ in [*grammars, *thinking])
            return None

    def _choose(self, logits_RV: Tensor, rows: list[SlotSampling], slots: list[int], positions: list[int]) -> Tensor:
        ids_R = logits_RV.argmax(-1)
        draws = [row.draw for row in rows]
        for kind in ("plain", "filtered"):
            if kind not in draws:
                continue
            of_kind = [r for r, draw in enumerate(draws) if draw == kind]
            # The same computation for a row whatever its neighbours are: each kind has one way of drawing.
            device, table = self.table.device, self.table
            index = torch.tensor(of_kind, device=device)
            slot = torch.tensor([slots[r] for r in of_kind], device=device)
            position = torch.tensor([positions[r] for r in of_kind], device=device)
            chosen_RV, temperature, seed = logits_RV[index], table.temperature[slot], table.seed[slot]
            if kind == "plain":
                ids_R[index] = self._sample(chosen_RV, temperature, seed, position)
            else:
                filters = (table.top_k[slot], table.top_p[slot], table.min_p[slot])
                ids_R[index] = sample_filtered(chosen_RV, temperature, *filters, uniform(seed, position))
        return ids_R


def _logprobs(logits_RV: Tensor, ids_R: Tensor, rows: list[SlotSampling]) -> dict[int, TokenLogprobs]:
    """By row, for those that asked."""
    wanted = {r: row.logprobs for r, row in enumerate(rows) if row.logprobs is not None}
    if not wanted:
        return {}
    index = list(wanted)
    entries = token_logprobs(logits_RV[index], ids_R[index], max(wanted.values()))
    return {
        r: TokenLogprobs(e.token_id, e.logprob, e.rank, e.top_ids[:k], e.top_logprobs[:k])
        for (r, k), e in zip(wanted.items(), entries, strict=True)
    }
