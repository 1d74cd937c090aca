"""Which checkpoint tensors become which parameters, as data: rename, concatenate, stack, reshape, shard.

A family writes its plan once, as a list of targets built for one rank. Loading, dummy weights, the check for
missing and unexpected tensors and the size printed in the progress bar all read that same list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from thalweg.errors import ConfigError
from thalweg.quant.dtypes import DTYPE_BYTES
from thalweg.quant.scheme import PLAIN, Index, Range, Scheme, Shape, Stored

Dtype = Literal["model", "float32"]
Init = Literal["normal", "ones", "zeros", "a_log", "dt_bias"]


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor, the part of it that this rank reads, and the place in the target it fills.

    `shape` is the full shape in the checkpoint. `shard_dim` is the dimension split under tensor parallelism
    (None: replicated) and `shard` this rank's range of it. `into` indexes the target's leading dimensions: an
    int picks one entry, a range keeps the dimension, () is all of it. The part is reshaped to the place it
    fills. With `repeat` every row (dimension 0) of the checkpoint stands for so many rows here, which a
    `shard` of rows counts: scales of blocks. With `scales` the part is in float8, and multiplied with these as it is
    loaded.
    """

    name: str
    shape: Shape
    shard_dim: int | None = None
    shard: Range | None = None
    into: tuple[Index, ...] = ()
    repeat: int = 1
    scales: Source | None = None

    @property
    def local_shape(self) -> Shape:
        """Shape of this rank's part, before any reshape."""
        if self.shard_dim is None or self.shard is None:
            return self.shape
        start, stop = self.shard
        return (*self.shape[: self.shard_dim], stop - start, *self.shape[self.shard_dim + 1 :])

    @property
    def read_shape(self) -> Shape:
        """Shape of what is read of the checkpoint."""
        start, stop = self.stored_range
        dim = self.shard_dim
        if dim is None or stop is None:
            return self.shape
        return (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])

    @property
    def stored_range(self) -> tuple[int, int | None]:
        """What to read of `shard_dim` in the checkpoint."""
        if self.shard is None:
            return 0, None
        start, stop = self.shard
        repeat = self.repeat if self.shard_dim == 0 else 1
        return start // repeat, -(-stop // repeat)


@dataclass(frozen=True, slots=True)
class Target:
    """One weight on this rank: its local shape, its dtype ("model" follows --dtype), its scheme, and what fills it.

    With `scales` the checkpoint stores the weight as the scheme does: these fill the scheme's second tensor.

    It is one parameter, or several where its scheme stores it so; an expert's matrix has `parts` parts of rows. `add`
    is added to what the checkpoint holds. Where the sources leave something uncovered (vocabulary rows past the end on
    the last rank) it becomes zero. `init` says how dummy weights are drawn. `elsewhere` is the rest of a weight of
    which other ranks hold whole tensors.
    """

    name: str
    shape: Shape
    sources: tuple[Source, ...]
    dtype: Dtype = "model"
    init: Init = "normal"
    scheme: Scheme = PLAIN
    add: float = 0.0
    parts: int = 1
    scales: tuple[Source, ...] = ()
    elsewhere: Target | None = None

    @property
    def covered(self) -> bool:
        """Whether the sources fill every element."""
        return sum(prod(s.local_shape) for s in self.sources) * self.scheme.packed == prod(self.shape)

    @property
    def read(self) -> tuple[Source, ...]:
        """All that is read of the checkpoint for it."""
        return (*self.sources, *self.scales, *(s.scales for s in self.sources if s.scales is not None))

    @property
    def parameters(self) -> tuple[Stored, ...]:
        """The parameters that hold it: `suffix` is added to the name, a dtype "model" is --dtype."""
        if self.dtype != "model":
            return (Stored("", self.shape, self.dtype),)
        return self.scheme.stored(self.shape, self.parts)


def whole(
    name: str,
    source: str,
    shape: Shape,
    *,
    dtype: Dtype = "model",
    init: Init = "normal",
    add: float = 0.0,
) -> Target:
    """A replicated parameter, as it stands in the checkpoint but for `add`."""
    return Target(name, shape, (Source(source, shape),), dtype, init, add=add)


def split(
    name: str,
    source: str,
    shape: Shape,
    dim: int,
    part: Range,
    *,
    local: Shape | None = None,
    dtype: Dtype = "model",
    init: Init = "normal",
) -> Target:
    """A parameter split along `dim` of the checkpoint's shape; `local` is its shape here if reshaped too."""
    piece = Source(source, shape, dim, part)
    return Target(name, local or piece.local_shape, (piece,), dtype, init)


def placed(
    source: str, shape: Shape, into: tuple[Index, ...], dim: int | None = None, part: Range | None = None
) -> Source:
    """A piece of a merged or stacked parameter."""
    return Source(source, shape, dim, part, into)


def concat(name: str, pieces: Sequence[Source], shape: Shape | None = None) -> Target:
    """A parameter made of pieces one below the other along dim 0. Pieces come without a place (`into`).

    `shape` is the parameter's local shape where the pieces are reshaped; its rows must be the pieces' rows.
    """
    row, stacked = 0, []
    for piece in pieces:
        rows = piece.local_shape[0]
        stacked.append(Source(piece.name, piece.shape, piece.shard_dim, piece.shard, ((row, row + rows),)))
        row += rows
    return Target(name, shape or (row, *pieces[0].local_shape[1:]), tuple(stacked))


def everywhere(plan: Sequence[Target]) -> Iterator[Target]:
    """The plan's targets, and what other ranks hold of them."""
    for target in plan:
        yield target
        if target.elsewhere is not None:
            yield target.elsewhere


def checkpoint_shapes(plan: Sequence[Target]) -> dict[str, Shape]:
    """Every checkpoint tensor that the plan reads, or knows another rank to read, with its full shape."""
    return {s.name: s.shape for t in everywhere(plan) for s in t.read}


def parameters(plan: Sequence[Target]) -> int:
    """Elements of the checkpoint's weights over all ranks, scales left out and packed ones counted one by one."""
    packed = {s.name: (prod(s.shape), t.scheme.packed if t.scales else 1) for t in everywhere(plan) for s in t.sources}
    return sum(items * each for items, each in packed.values())


def check_targets(plan: Sequence[Target]) -> None:
    """Raise ConfigError when a parameter is filled twice, which is a mistake in the family's plan."""
    twice = [name for name, n in Counter(t.name for t in plan).items() if n > 1]
    if twice:
        raise ConfigError(f"the weight plan fills {', '.join(twice[:5])} twice; expected each parameter once")


def local_elements(plan: Sequence[Target]) -> dict[str, int]:
    """Elements this rank holds, by stored dtype ("model", "float32", ...), scales included."""
    counts: Counter[str] = Counter()
    for target in plan:
        for stored in target.parameters:
            counts[stored.dtype] += prod(stored.shape)
    return dict(counts)


def local_bytes(plan: Sequence[Target], model_bytes: int) -> int:
    """What the weights take on this rank, with `model_bytes` to an element of --dtype: known before they load."""
    sizes = {"model": model_bytes, **DTYPE_BYTES}
    return sum(count * sizes[dtype] for dtype, count in local_elements(plan).items())
