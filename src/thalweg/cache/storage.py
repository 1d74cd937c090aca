"""The tensors behind the cache: blocks for what layers keep per token, slots for what they keep per sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from thalweg.cache.packed import PackedSnapshots
from thalweg.cache.specs import LayerSpecs, PagedSpec, StateSpec
from thalweg.quant.dtypes import DTYPE_BYTES

ALIGNMENT = 256  # bytes that the tensor of every layer begins at a multiple of, as one of its own would


class CacheStorage:
    """`layers` has the tensors of each layer by the names of its specs, zeros at first:
    [num_blocks + 1, block_size, *shape] of a PagedSpec, [num_slots + 1 + num_snapshots, *shape] of a StateSpec.

    Block 0 and slot 0 are the sinks that padding rows write to; nobody reads them. If snapshots are packed, in a
    `snapshot_dtype` other than "auto", the rows after the slots are `num_staged` ones, which prefills write their
    states at boundaries to; `settle` packs them.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpecs],
        num_blocks: int,
        num_slots: int,
        block_size: int,
        device: torch.device,
        num_snapshots: int = 0,
        snapshot_dtype: str = "auto",
        num_staged: int = 0,
    ) -> None:
        self.num_slots, self.block_size, self.device = num_slots, block_size, device
        self.layers: list[dict[str, Tensor]] = [{} for _ in specs]
        self.paged: list[Tensor] = []  # all tensors of PagedSpecs
        alike: dict[StateSpec, list[tuple[int, str]]] = defaultdict(list)
        for i, layer in enumerate(specs):
            for name, spec in layer.items():
                if isinstance(spec, PagedSpec):
                    shape = (num_blocks + 1, block_size, *spec.shape)
                    self.layers[i][name] = torch.zeros(shape, dtype=_dtype(spec.dtype), device=device)
                    self.paged.append(self.layers[i][name])
                else:
                    alike[spec].append((i, name))
        # States of one shape and dtype lie in one tensor [owners, num_slots + 1 + num_snapshots, *shape], so that one
        # launch resets slots in all of them, and kernels write snapshots where they write slots.
        self.states: list[Tensor] = []
        self._packed: list[PackedSnapshots] | None = None if snapshot_dtype == "auto" else []
        rows = num_slots + 1 + (num_snapshots if self._packed is None else num_staged)
        for spec, owners in alike.items():
            states = _aligned(len(owners), (rows, *spec.shape), spec.dtype, device)
            self.states.append(states.view(torch.int8) if states.itemsize == 1 else states)
            for (i, name), state in zip(owners, states, strict=True):
                self.layers[i][name] = state
            if self._packed is not None:
                self._packed.append(PackedSnapshots(self.states[-1], spec, num_snapshots, snapshot_dtype))
        self._wide = [_wide(states) for states in self.states]

    def reset_slots(self, slots: Tensor) -> None:
        """Zero the states of slots (int64 [n]) that begin a sequence, so that nothing of an earlier one shows."""
        for states in self.states:
            states.index_fill_(1, slots, 0)

    @property
    def saved(self) -> list[Tensor]:
        """Tensors [owners, rows, ...] that hold snapshots, each in row `saved_row(snapshot)`."""
        if self._packed is None:
            return self.states
        return [part for packed in self._packed for part in packed.parts]

    def saved_row(self, snapshot: int) -> int:
        return self.num_slots + snapshot if self._packed is None else snapshot

    def boundary_row(self, index: int, snapshot: int) -> int:
        """The row of states that a step's boundary number `index`, of a snapshot (numbered from 1), is written to."""
        return self.num_slots + (snapshot if self._packed is None else 1 + index)

    def settle(self, snapshots: Sequence[int]) -> None:
        """The snapshots of a step's boundaries, in their order, are in their rows."""
        if self._packed is not None:
            for index, snapshot in enumerate(snapshots):
                for packed in self._packed:
                    packed.save(self.boundary_row(index, snapshot), snapshot)

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy all states of slots into snapshots, as (slot, snapshot)."""
        if self._packed is None:
            self.copy_slots([(slot, self.saved_row(snapshot)) for slot, snapshot in pairs])
            return
        for slot, snapshot in pairs:
            for packed in self._packed:
                packed.save(slot, snapshot)

    def restore(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy snapshots into slots, as (slot, snapshot)."""
        if self._packed is None:
            self.copy_slots([(self.saved_row(snapshot), slot) for slot, snapshot in pairs])
            return
        for slot, snapshot in pairs:
            for packed in self._packed:
                packed.restore(snapshot, slot)

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy all states of slots into others, as (source, target), none of which is both: in one launch per shape and
        dtype for those that follow each other, as those of sequences that began together do."""
        for source, target, n in _runs(sorted(pairs)):
            for states in self._wide:
                states[:, target : target + n].copy_(states[:, source : source + n])


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(source, target, n) of runs in which both grow by one."""
    start = 0
    for i in range(1, len(pairs) + 1):
        source, target = pairs[start]
        if i == len(pairs) or pairs[i] != (source + i - start, target + i - start):
            yield source, target, i - start
            start = i


def _wide(states: Tensor) -> Tensor:
    """[owners, rows, n] of int64, of which a copy is quicker than of what is in them, if rows are whole ones."""
    flat = states.view(*states.shape[:2], -1)
    return flat.view(torch.int64) if flat.shape[2] * flat.itemsize % 8 == 0 else flat


def _aligned(count: int, shape: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    """Zeros [count, *shape], each of the `count` parts contiguous and aligned."""
    unit = ALIGNMENT // DTYPE_BYTES[dtype]
    size = prod(shape)
    rows = torch.zeros(count, -(-size // unit) * unit, dtype=_dtype(dtype), device=device)
    parts: Tensor = rows[:, :size].unflatten(1, shape)
    return parts


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
