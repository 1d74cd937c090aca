"""Host values on their way to the device without a wait, and what a prefill's kernels need to know of its sequences.

Kernels are compiled for what their arguments look like. They are told not to look at what changes from step to step,
counts and where in a table a part of it begins, or they would be compiled again while requests wait.

A step with prefills runs eagerly, with tables made for it, or as a graph, which was captured once for many steps. Then
offsets, starts and boundaries are `PerStep`, values that the host does not know while it captures, and the tables that
follow from them lie in `Tables`, at fixed addresses. Kernels must not care which: a table has as many entries as any
such step needs, and those that a step does not need ask for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def to_device(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """The values (integers of a list become int64) on `device`. The copy is queued; nobody waits for it."""
    tensor = torch.from_numpy(np.asarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def all_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """As `to_device`, several arrays in one copy. Each begins at a multiple of 16 bytes."""
    starts = [0, *accumulate(-(-array.nbytes // 16) * 16 for array in arrays)]
    image = np.empty(starts[-1], dtype=np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        image[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    there = to_device(image, device)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def table(values: Sequence[int], device: torch.device) -> Tensor:
    """The values as int32 on `device`. The layers of a step ask alike, and get the same tensor."""
    return values.as_table() if isinstance(values, PerStep) else _table(tuple(values), device)


@lru_cache(maxsize=16)
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(np.array(values, dtype=np.int32), device)


class Pieces(NamedTuple):
    """The tokens of a prefill cut into pieces of at most `size` tokens, none of which spans two sequences.

    In a captured step, those beyond the step's own are empty: they begin where the last sequence ends.
    """

    num: int
    pieces_N2: Tensor  # int32: sequence, its first token here
    offsets_B1: Tensor  # int32: sequence b owns tokens offsets[b]:offsets[b + 1]
    firsts_B1: Tensor  # int32: and pieces firsts[b]:firsts[b + 1]
    saves_N: Tensor  # int32: where the state at the piece's end is written besides; 0: nowhere


Boundaries = Sequence[tuple[int, int, int]]
"""(sequence, tokens of it, slot): after so many tokens its state is written into that slot too."""


def pieces(offsets: Sequence[int], size: int, device: torch.device, boundaries: Boundaries = ()) -> Pieces:
    """The pieces of sequences with these offsets. The layers of a step ask alike, and get the same tensors."""
    if isinstance(offsets, PerStep):
        saving, tables = isinstance(boundaries, PerStep), offsets.tables

        def cut(step: StepSequences) -> Cut:
            return _cut(step.offsets, size, step.boundaries if saving else ())

        return tables.pieces(("pieces", size, saving), size, tables.limits.tokens, cut)
    return _pieces(tuple(offsets), size, device, tuple(boundaries))


class Contexts(NamedTuple):
    """All tokens of each sequence, those before the step included, one sequence after another, and their pieces."""

    total: int  # tokens; in a captured step, the most that there may be
    cut: Pieces
    totals_B3: Tensor  # int32: 0, all tokens of the sequence, those before the step
    first: int = 0  # token of the sequence: above 0 in a later part of a single one, of which `total` counts the tokens


def contexts(starts: Sequence[int], offsets: Sequence[int], size: int, device: torch.device) -> Contexts:
    """Of sequences with `starts` tokens before the step. A sequence without new tokens has none at all."""
    if isinstance(offsets, PerStep):
        tables = offsets.tables
        most, B = tables.limits.context, len(starts)
        cut = tables.pieces(("contexts", size), size, most, lambda s: _cut(_spans(s)[0], size, ()))
        return Contexts(most, cut, tables.table("spans", 3 * B, lambda s: _spans(s)[1].ravel()).view(B, 3))
    return _contexts(tuple(starts), tuple(offsets), size, device)


@lru_cache(maxsize=8)
def _contexts(starts: tuple[int, ...], offsets: tuple[int, ...], size: int, device: torch.device) -> Contexts:
    ends, totals_B3 = _spans(StepSequences(list(offsets), list(starts), []))
    return Contexts(ends[-1], _pieces(tuple(ends), size, device, ()), to_device(totals_B3, device))


@lru_cache(maxsize=8)
def _pieces(
    offsets: tuple[int, ...], size: int, device: torch.device, boundaries: tuple[tuple[int, int, int], ...]
) -> Pieces:
    parts = _cut(offsets, size, boundaries)
    sizes = [part.size for part in parts]
    on_device = to_device(np.concatenate([part.ravel() for part in parts]), device)
    both, offsets_B1, firsts_B1, saves_N = on_device.split(sizes)
    return Pieces(len(saves_N), both.view(-1, 2), offsets_B1, firsts_B1, saves_N)


Cut = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # what Pieces has, int32


def _cut(offsets: Sequence[int], size: int, boundaries: Boundaries) -> Cut:
    starts = np.array(offsets, dtype=np.int32)
    counts = -((starts[:-1] - starts[1:]) // size)
    firsts = np.zeros(len(starts), dtype=np.int32)
    np.cumsum(counts, out=firsts[1:])
    sequence = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    token = starts[sequence] + (np.arange(len(sequence), dtype=np.int32) - firsts[sequence]) * size
    saves = np.zeros(len(sequence), dtype=np.int32)
    for b, tokens, slot in boundaries:
        assert tokens in range(size, starts[b + 1] - starts[b] + 1, size), "a state is there at a piece's end"
        saves[firsts[b] + tokens // size - 1] = slot
    return np.stack((sequence, token), 1), starts, firsts, saves


def _spans(step: StepSequences) -> tuple[list[int], np.ndarray]:
    """Where the contexts of sequences begin and end one after another, and Contexts.totals_B3."""
    spans = [
        (0, start + end - begin if end > begin else 0, start)
        for start, begin, end in zip(step.starts, step.offsets, step.offsets[1:], strict=False)
    ]
    return [*accumulate((total for _, total, _ in spans), initial=0)], np.array(spans, dtype=np.int32).reshape(-1, 3)


class StepSequences(NamedTuple):
    """What the host knows of a step's prefills."""

    offsets: Sequence[int]
    starts: Sequence[int]
    boundaries: Boundaries


class Limits(NamedTuple):
    """What the steps of one captured graph have in common: prefills, their new tokens, and at most so many tokens in
    their contexts, which count the new ones."""

    sequences: int
    tokens: int
    context: int


class UnknownWhileCapturing(Exception):
    """An op looked at host values that change from step to step while a graph was captured."""


class PerStep(Sequence[T]):
    """Values of the step under way, for an op that is called with them. While a graph is captured nobody may look at
    them, but for those that are `known` to be the same in every step: what was read would hold for all later ones."""

    def __init__(self, tables: Tables, name: str, length: int | None = None, known: Mapping[int, T] | None = None):
        self.tables, self._name, self._length, self._known = tables, name, length, known or {}

    @property
    def _values(self) -> Sequence[T]:
        if self.tables.frozen:
            raise UnknownWhileCapturing(f"the {self._name} of sequences are not known while a graph is captured")
        values: Sequence[T] = getattr(self.tables.step, self._name)
        return values

    def __len__(self) -> int:
        return len(self._values) if self._length is None else self._length

    @overload
    def __getitem__(self, i: int) -> T: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[T]: ...

    def __getitem__(self, i: int | slice) -> T | Sequence[T]:
        if isinstance(i, slice) and self._length and i.indices(self._length) == (0, self._length, 1):
            return self
        if isinstance(i, int) and self._known and (place := i % len(self)) in self._known:
            return self._known[place]
        return self._values[i]

    def __iter__(self) -> Iterator[T]:
        return iter(self._values)

    def as_table(self) -> Tensor:
        """int32 on the device."""
        name = self._name
        return self.tables.table(name, len(self), lambda s: np.array(getattr(s, name), dtype=np.int32))


class Tables:
    """Tables at fixed addresses within `memory` (int32 on the device), for the steps of one graph.

    Ops ask for them while such a step runs before it is captured; from then on `fill` writes what they are for a step
    into an image of the memory on the host, which whoever stages the step copies over.
    """

    def __init__(self, limits: Limits, memory: Tensor) -> None:
        self.limits, self._memory = limits, memory
        B = limits.sequences
        self.step = StepSequences([0] * B + [limits.tokens], [0] * B, [])
        self.offsets: PerStep[int] = PerStep(self, "offsets", B + 1, {0: 0, B: limits.tokens})
        self.starts: PerStep[int] = PerStep(self, "starts", B)
        self.boundaries: PerStep[tuple[int, int, int]] = PerStep(self, "boundaries")
        self.frozen = False  # while the graph is captured
        self._used = 0
        self._tables: dict[Hashable, tuple[slice, Callable[[StepSequences], np.ndarray]]] = {}

    def fill(self, step: StepSequences, image: np.ndarray) -> None:
        """Every table asked for so far, of this step, into `image` int32 [len(memory)]."""
        self.step = step
        for place, make in self._tables.values():
            image[place] = make(step)

    def table(self, key: Hashable, size: int, make: Callable[[StepSequences], np.ndarray]) -> Tensor:
        """int32 [size] that is what `make` gives for the step under way. One key stands for one table."""
        if key not in self._tables:
            if self.frozen:
                raise UnknownWhileCapturing(f"the table {key!r} was not asked for before the graph was captured")
            place = slice(self._used, self._used + size)
            self._used += -(-size // 4) * 4  # addresses are multiples of 16 bytes, as kernels are compiled for
            assert self._used <= len(self._memory), "memory for the tables of a step"
            self._tables[key] = place, make
            self._memory[place] = to_device(make(self.step), self._memory.device)
        return self._memory[self._tables[key][0]]

    def pieces(self, key: Hashable, size: int, most: int, cut: Callable[[StepSequences], Cut]) -> Pieces:
        """Of at most `most` tokens of the sequences, as `cut` cuts them."""
        B1 = self.limits.sequences + 1
        num = most // size + self.limits.sequences
        sizes = (2 * num, B1, B1, num)
        places = [0, *np.cumsum([-(-n // 4) * 4 for n in sizes]).tolist()]

        def filled(step: StepSequences) -> np.ndarray:
            both, offsets, firsts, saves = cut(step)
            image = np.zeros(places[-1], dtype=np.int32)
            image[: 2 * num].reshape(num, 2)[:] = len(offsets) - 2, offsets[-1]  # empty
            for start, part in zip(places, (both, offsets, firsts, saves), strict=False):
                image[start : start + part.size] = part.ravel()
            return image

        image = self.table(key, places[-1], filled)
        both, offsets_B1, firsts_B1, saves_N = (image[a : a + n] for a, n in zip(places, sizes, strict=False))
        return Pieces(num, both.view(num, 2), offsets_B1, firsts_B1, saves_N)

    @staticmethod
    def words(limits: Limits) -> int:
        """int32 values that are enough for the tables of all ops: pieces of 16 tokens and more, and some besides."""
        return 3 * (limits.tokens + limits.context) // 8 + 64 * (limits.sequences + 8)
