"""What one forward pass gets besides weights: the rows of a step and where their caches are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences, T new tokens in all, flattened in order. The first `num_decodes` sequences have one new token
    each ("decode rows"); the others ("prefills") have any number. What decode rows need is on the device, so that
    a step of decode rows alone can run as a CUDA graph; prefills are launched by the host, from its own lists.
    """

    token_ids_T: Tensor  # int64 [T]
    num_decodes: int
    slots_B: Tensor  # int64 [B], state slot of each sequence
    block_tables_BN: Tensor  # int32 [B, N], page numbers; entries past the sequence's end are any valid page
    page_rows_T: Tensor  # int64 [T], row of the flattened pages [pages * block_size] that each new token fills
    decode_lens_B: Tensor  # int32 [num_decodes], tokens in the cache including this step's
    prefill_starts: list[int]  # [B - num_decodes], tokens in the cache before this step
    prefill_offsets: list[int]  # [B - num_decodes + 1], prefill p owns tokens num_decodes + offsets[p]:offsets[p + 1]
    logit_rows_R: Tensor | None  # int64 [R], which of the T rows need logits; None: all of them
