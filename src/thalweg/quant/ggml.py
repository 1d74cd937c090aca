"""Schemes of GGUF files: rows of GGML's blocks, kept in memory byte for byte."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from thalweg.quant.ggml_types import TYPES, GgmlType
from thalweg.quant.scheme import Index, Shape, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Segment = tuple[str, int]
"""A type's name, and how many rows have it."""

_NAME = re.compile(r"ggml (\d+) columns, (\w+ \d+(?: \+ \w+ \d+)*)")


@dataclass(frozen=True, slots=True)
class GgmlRows:
    """Weights [..., O, D] whose rows are GGML's blocks, each segment of rows in a type of its own: one tensor uint8
    [..., bytes of O rows]. Fused matrices of several types are segments below one another."""

    columns: int
    segments: tuple[Segment, ...]

    file_dtype = None
    packed = 1
    as_stored = True

    @staticmethod
    def of(columns: int, segments: Sequence[Segment]) -> GgmlRows:
        """Neighbours of one type are one segment."""
        merged: list[Segment] = []
        for kind, rows in segments:
            if merged and merged[-1][0] == kind:
                rows += merged.pop()[1]
            merged.append((kind, rows))
        return GgmlRows(columns, tuple(merged))

    @property
    def name(self) -> str:
        return f"ggml {self.columns} columns, {' + '.join(f'{kind} {rows}' for kind, rows in self.segments)}"

    @staticmethod
    def named(name: str) -> GgmlRows | None:
        """The scheme of this name; None for a name of another kind."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        segments = [segment.split() for segment in match[2].split(" + ")]
        return GgmlRows(int(match[1]), tuple((kind, int(rows)) for kind, rows in segments))

    def bytes_per_weight(self, model_bytes: int) -> float:
        return self._bytes(self._rows) / (self._rows * self.columns)

    def stored(self, shape: Shape, parts: int) -> tuple[Stored, ...]:
        return (Stored("", (*shape[:-2], self._bytes(shape[-2])), "uint8"),)

    def put(self, part: Tensor, into: tuple[Index, ...], stored: Sequence[Tensor]) -> None:
        """The part is rows of blocks, uint8; a whole range of experts comes one below the other."""
        *lead, rows = into if into and not isinstance(into[-1], int) else (*into, (0, self._rows))
        assert isinstance(rows, tuple)
        place = stored[0][tuple(i if isinstance(i, int) else slice(*i) for i in lead)]
        place = place[..., self._bytes(rows[0]) : self._bytes(rows[1])]
        place.copy_(part.reshape(place.shape))

    def widened(self, stored: Sequence[Tensor], parts: int, dtype: torch.dtype) -> Tensor:
        """Each element is rounded once to `dtype`."""
        import torch

        from thalweg.quant.ggml_blocks import dequantize

        (blocks,), at, rows = stored, 0, []
        for name, count in self.segments:
            kind = TYPES[name]
            size = count * kind.row_bytes(self.columns)
            segment = blocks[..., at : at + size].unflatten(-1, (count, -1))
            rows.append(dequantize(segment, kind, dtype))
            at += size
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)

    def rows_of(self, stored: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows [..., D] in `dtype` of ids [...], for weights [O, D] of one type."""
        from thalweg.quant.ggml_blocks import dequantize

        ((name, count),) = self.segments
        return dequantize(stored.view(count, -1)[ids], TYPES[name], dtype)

    @property
    def _rows(self) -> int:
        return sum(count for _, count in self.segments)

    def _bytes(self, rows: int) -> int:
        """Of the first `rows` rows."""
        total = 0
        for name, count in self.segments:
            total += min(rows, count) * TYPES[name].row_bytes(self.columns)
            rows -= min(rows, count)
        return total


def average_bytes(kinds: Sequence[tuple[GgmlType, Shape]]) -> float:
    """Bytes per element of tensors of these types."""
    elements = sum(prod(shape) for _, shape in kinds)
    return sum(prod(shape) * kind.bytes / kind.elements for kind, shape in kinds) / max(elements, 1)
