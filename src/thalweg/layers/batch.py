"""What one forward pass gets besides weights: the rows of a step and where their caches are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences, T new tokens in all, flattened in order. The first `num_decodes` sequences have one new token
    each ("decode rows"); the others ("prefills") have any number. What decode rows need is on the device; what prefills
    need of the host (prefill_offsets, starts, boundaries) are lists, or `PerStep` if the step may be captured.
    """

    token_ids_T: Tensor  # int64 [T]
    positions_T: Tensor  # int64 [T], index of each new token in its sequence
    num_decodes: int
    prefill_offsets: Sequence[int]  # [B - num_decodes + 1]: prefill p owns tokens num_decodes + [p]:[p + 1]
    starts: Sequence[int]  # [B - num_decodes], tokens that each prefill has in the cache before this step
    slots_B: Tensor  # int64 [B], state slot of each sequence
    block_tables_BN: Tensor  # int32 [B, N], block numbers; entries past the sequence's end are any valid block
    block_rows_T: Tensor  # int64 [T], row of the flattened blocks [blocks * block_size] that each new token fills
    context_lens_B: Tensor  # int32 [num_decodes], tokens in the cache including this step's
    logit_rows_R: Tensor | None  # int64 [R], which of the T rows need logits; None: all of them
    # (prefill, tokens of it, slot): after so many tokens, a multiple of 64, its states are written into that slot too
    boundaries: Sequence[tuple[int, int, int]] = ()
    gathers: bool = True  # whether all logits are wanted, or of several ranks this one's alone
