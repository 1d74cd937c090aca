"""Scheme "int4": four bits an element, symmetric, with one scale for each group of 32 columns of a row.

The layout is that of compressed-tensors (pack-quantized): element k of a row stands in bits 4 (k % 8) and up of word
k // 8, as its value + 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thalweg.quant.scheme import Index, Shape, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = 32  # columns that share a scale
WORD = 8  # elements in an int32


def groups(columns: int) -> int:
    """How many groups a row has; the last may be partial."""
    return -(-columns // GROUP)


class Int4Groups:
    """Weights [E, O, D] of experts as checkpoints store them: words int32 [E, O, D / 8], scales [E, O, ceil(D / 32)] in
    the model's dtype."""

    name, file_dtype, packed, as_stored, rate = "int4", "I32", WORD, False, 1.0

    def bytes_per_weight(self, model_bytes: int) -> float:
        return 0.5 + model_bytes / GROUP

    def stored(self, shape: Shape, parts: int) -> tuple[Stored, ...]:
        *rows, columns = shape
        return Stored("", (*rows, columns // WORD), "int32"), Stored("_scale", (*rows, groups(columns)), "model")

    def put(self, part: Tensor, into: tuple[Index, ...], stored: Sequence[Tensor]) -> None:
        raise NotImplementedError("experts are not quantized to int4 as they are loaded, only taken as they are stored")

    def rows_of(self, stored: Sequence[Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("vocabularies are kept in the model's dtype")

    def widened(self, stored: Sequence[Tensor], parts: int, dtype: torch.dtype) -> Tensor:
        """(nibble - 8) * scale, rounded once to `dtype`."""
        import torch

        words, scales = stored
        shifts = torch.arange(0, 4 * WORD, 4, dtype=torch.int32, device=words.device)
        values = ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2) - 8
        by_column = scales.float().repeat_interleave(GROUP, -1)[..., : values.shape[-1]]
        return (values * by_column).to(dtype)
