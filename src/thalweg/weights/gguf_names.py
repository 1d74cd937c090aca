"""How a GGUF file holds the tensors of a checkpoint, as data: which rows of which of its tensors, and what is done to
them. One description serves reading and writing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from thalweg.quant.ggml import Tile
from thalweg.quant.scheme import Range, Shape

Change = Literal["none", "shifted", "decay", "latent_up"]
"""shifted: one is added to norm weights. decay: A_log is held as -exp(A_log). latent_up: kv_b_proj [H * (nope + value),
rank] is held as k_b [H, rank, nope] and v_b [H, value, rank]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a GGUF tensor, all of them without a range; or columns of one, if Held says so."""

    name: str
    part: Range | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A checkpoint's tensor: pieces of rows one below the other, or of columns side by side if `by_column`, in `shape`.

    Rows are counted as if the fastest dimension were the only one: those of a vector are its elements. With `tile` the
    pieces of columns are all of them in another order.
    """

    pieces: tuple[Piece, ...]
    shape: Shape
    change: Change = "none"
    by_column: bool = False
    tile: Tile | None = None


@dataclass(slots=True)
class GgufNames:
    """Every tensor of a checkpoint by its name there, and the shapes, slowest dimension first, of GGUF tensors."""

    held: dict[str, Held] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    def whole(
        self, theirs: str, gguf: str, shape: Shape, *, change: Change = "none", stored: Shape | None = None
    ) -> None:
        """A tensor that is held as one, in the shape `stored` if that is another."""
        self.held[theirs] = Held((Piece(gguf),), shape, change)
        self.shapes[gguf] = shape if stored is None else stored

    def cut(self, theirs: str, parts: Iterable[tuple[str, Range]], shape: Shape, *, change: Change = "none") -> None:
        """A tensor made of ranges of rows."""
        self.held[theirs] = Held(_merged(parts), shape, change)

    def columns(self, theirs: str, gguf: str, parts: Iterable[Range], shape: Shape, tile: Tile) -> None:
        """A matrix made of ranges of columns, which `tile` says, too."""
        self.held[theirs] = Held(_merged((gguf, part) for part in parts), shape, by_column=True, tile=tile)


def _merged(parts: Iterable[tuple[str, Range]]) -> tuple[Piece, ...]:
    """Ranges that follow one another are one."""
    merged: list[tuple[str, Range]] = []
    for name, (start, stop) in parts:
        if merged and merged[-1][0] == name and merged[-1][1][1] == start:
            start = merged.pop()[1][0]
        merged.append((name, (start, stop)))
    return tuple(Piece(*part) for part in merged)
