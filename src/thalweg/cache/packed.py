"""Snapshots of recurrent states in fewer bytes than the states themselves: rounded to bfloat16, or to int8 with scales.

What is restored is near what was saved; docs/experiments/prefix-cache.md says how near."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.cache.specs import StateSpec, packs

LEAST = 1e-30  # that a channel without anything in it is taken to hold


class PackedSnapshots:
    """`parts`: tensors [owners, num_snapshots + 1, ...] that hold all snapshots of states of one spec, which lie in
    `states` [owners, rows, *spec.shape]. Row 0 is nobody's."""

    def __init__(self, states: Tensor, spec: StateSpec, num_snapshots: int, dtype: str) -> None:
        self._states = states
        lead = (states.shape[0], num_snapshots + 1)
        packed = getattr(torch, dtype) if packs(spec, dtype) else states.dtype
        self.parts = [torch.zeros(*lead, *states.shape[2:], dtype=packed, device=states.device)]
        if packed == torch.int8:  # a scale for each key channel, and one for each value of a head [V, K]
            heads, V, K = states.shape[2:]
            for shape in ((heads, 1, K), (heads, V, 1)):
                self.parts.append(torch.zeros(*lead, *shape, dtype=torch.float32, device=states.device))

    def save(self, row: int, snapshot: int) -> None:
        """Pack a row of the states."""
        source = self._states[:, row]
        if len(self.parts) == 1:
            self.parts[0][:, snapshot].copy_(source)
            return
        packed, keys, values = self.parts
        # Channels differ in size since each decays at its own rate, and values since inputs do. The root leaves some of
        # the difference between channels to the values, which halves the error of either scale alone.
        key = source.float().abs().amax(-2, keepdim=True).clamp_(min=LEAST).sqrt_()
        even = source / key
        value = even.abs().amax(-1, keepdim=True).clamp_(min=LEAST).div_(127)
        keys[:, snapshot].copy_(key)
        values[:, snapshot].copy_(value)
        packed[:, snapshot].copy_(even.div_(value).round_())

    def restore(self, snapshot: int, row: int) -> None:
        """Unpack into a row of the states."""
        target = self._states[:, row]
        if len(self.parts) == 1:
            target.copy_(self.parts[0][:, snapshot])
            return
        packed, keys, values = self.parts
        target.copy_(packed[:, snapshot].float() * keys[:, snapshot] * values[:, snapshot])
