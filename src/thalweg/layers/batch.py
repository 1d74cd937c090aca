"""What one forward pass gets besides weights: the rows of a step and where their caches are."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences, T new tokens in all, flattened in order. The first `num_decodes` sequences have one new token
    each ("decode rows"); the others ("prefills") have any number. What decode rows need is on the device, so that
    a step of decode rows alone can run as a CUDA graph; prefills are launched by the host, from its own lists.
    """

    token_ids_T: Tensor  # int64 [T]
    positions_T: Tensor  # int64 [T], index of each new token in its sequence
    num_decodes: int
    query_lens: list[int]  # [B], new tokens of each sequence
    starts: list[int]  # [B - num_decodes], tokens that each prefill has in the cache before this step
    slots_B: Tensor  # int64 [B], state slot of each sequence
    block_tables_BN: Tensor  # int32 [B, N], block numbers; entries past the sequence's end are any valid block
    block_rows_T: Tensor  # int64 [T], row of the flattened blocks [blocks * block_size] that each new token fills
    context_lens_B: Tensor  # int32 [num_decodes], tokens in the cache including this step's
    logit_rows_R: Tensor | None  # int64 [R], which of the T rows need logits; None: all of them
    # (prefill, tokens of it, slot): after so many tokens, a multiple of 64, its states are written into that slot too
    boundaries: list[tuple[int, int, int]] = field(default_factory=list)
    # [B - num_decodes + 1], from query_lens: prefill p owns tokens num_decodes + offsets[p]:offsets[p + 1]
    prefill_offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefill_offsets", [*accumulate(self.query_lens[self.num_decodes :], initial=0)])
