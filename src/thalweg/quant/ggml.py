"""Schemes of GGUF files: rows of GGML's blocks, kept in memory byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thalweg.quant.ggml_types import TYPES
from thalweg.quant.scheme import Index, Shape, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Segment = tuple[str, int]
"""A type's name, and how many rows have it."""

Tile = tuple[int, int, int]
"""(R, G, V): G * R runs of V columns, of which a file has run (r, g) where r * G + g stands and a checkpoint where
g * R + r does."""

_NAME = re.compile(r"([A-Z]\w+ \d+(?: \+ [A-Z]\w+ \d+)*)(?:, tiled (\d+) x (\d+) x (\d+))?")
_SLICE = 1 << 20  # elements
_BLOCK = 256  # elements, a multiple of those of every type's blocks


@dataclass(frozen=True, slots=True)
class GgmlRows:
    """Weights [..., O, D] whose rows are GGML's blocks, each segment of rows in a type of its own: one tensor uint8
    [..., bytes of O rows]. Fused matrices of several types are segments below one another."""

    segments: tuple[Segment, ...]
    tile: Tile | None = None  # columns are in a file's order, which no whole blocks could be moved out of

    file_dtype = None
    packed = 1
    as_stored, rate = True, 1.0

    @staticmethod
    def of(segments: Sequence[Segment], tile: Tile | None = None) -> GgmlRows:
        """Neighbours of one type are one segment."""
        merged: list[Segment] = []
        for kind, rows in segments:
            if merged and merged[-1][0] == kind:
                rows += merged.pop()[1]
            merged.append((kind, rows))
        return GgmlRows(tuple(merged), tile)

    @staticmethod
    def average(kinds: Mapping[str, int]) -> GgmlRows:
        """What stands for matrices of several types, where only their bytes count: `kinds` are elements by type."""
        return GgmlRows(tuple((kind, max(1, count // _BLOCK)) for kind, count in sorted(kinds.items())))

    @property
    def name(self) -> str:
        tiled = "" if self.tile is None else f", tiled {' x '.join(map(str, self.tile))}"
        return " + ".join(f"{kind} {rows}" for kind, rows in self.segments) + tiled

    @staticmethod
    def named(name: str) -> GgmlRows | None:
        """The scheme of this name; None for a name of another kind."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        segments = [segment.split() for segment in match[1].split(" + ")]
        tile = None if match[2] is None else (int(match[2]), int(match[3]), int(match[4]))
        return GgmlRows(tuple((kind, int(rows)) for kind, rows in segments), tile)

    def bytes_per_weight(self, model_bytes: int) -> float:
        return self._bytes(self._rows, _BLOCK) / (self._rows * _BLOCK)

    def stored(self, shape: Shape, parts: int) -> tuple[Stored, ...]:
        return (Stored("", (*shape[:-2], self._bytes(shape[-2], shape[-1])), "uint8"),)

    def put(self, part: Tensor, into: tuple[Index, ...], stored: Sequence[Tensor]) -> None:
        """The part is rows of blocks, uint8; a whole range of experts comes one below the other."""
        leading = stored[0].ndim - 1
        lead, rows = into[:leading], into[leading] if len(into) > leading else (0, self._rows)
        assert isinstance(rows, tuple)
        place = stored[0][tuple(i if isinstance(i, int) else slice(*i) for i in lead)]
        columns = self._columns(stored[0])
        place = place[..., self._bytes(rows[0], columns) : self._bytes(rows[1], columns)]
        place.copy_(part.reshape(place.shape))

    def widened(self, stored: Sequence[Tensor], parts: int, dtype: torch.dtype) -> Tensor:
        """Each element is rounded once to `dtype`."""
        import torch

        rows = list(self.slices(stored[0], dtype))
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)

    def slices(self, blocks: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """The elements, a range of rows [..., n, D] after another: what is widened at a time stays in the caches of a
        processor, and a matrix takes no memory in `dtype`."""
        from thalweg.quant.ggml_blocks import dequantize

        at, columns = 0, self._columns(blocks)
        step = max(1, _SLICE // columns)
        for name, count in self.segments:
            kind = TYPES[name]
            size = kind.row_bytes(columns)
            for first in range(0, count, step):
                rows = min(step, count - first)
                part = blocks[..., at : at + rows * size].unflatten(-1, (rows, size))
                at += rows * size
                yield self._in_order(dequantize(part, kind, dtype))

    def _in_order(self, rows: Tensor) -> Tensor:
        """With columns as a checkpoint has them."""
        return rows if self.tile is None else rows.unflatten(-1, self.tile).transpose(-3, -2).flatten(-3)

    def rows_of(self, stored: Sequence[Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
        from thalweg.quant.ggml_blocks import dequantize

        ((name, count),) = self.segments
        return dequantize(stored[0].view(count, -1)[ids], TYPES[name], dtype)

    @property
    def _rows(self) -> int:
        return sum(count for _, count in self.segments)

    def _columns(self, blocks: Tensor) -> int:
        """Of the weight that has these bytes."""
        return blocks.shape[-1] * _BLOCK // self._bytes(self._rows, _BLOCK)

    def _bytes(self, rows: int, columns: int) -> int:
        """Of the first `rows` rows."""
        total = 0
        for name, count in self.segments:
            total += min(rows, count) * TYPES[name].row_bytes(columns)
            rows -= min(rows, count)
        return total
