"""The tensors behind the cache: pages for layers that keep values per token, slots for layers that keep state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thalweg.cache.specs import LayerSpec, PagedSpec


class CacheStorage:
    """One entry a layer: {"pages": [num_blocks + 1, block_size, C]} or {name: [num_slots + 1, *shape]}.

    Page 0 and slot 0 are the sink that padding rows write to; nobody reads them.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_blocks: int,
        num_slots: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.layers: list[dict[str, Tensor]] = []
        for spec in specs:
            if isinstance(spec, PagedSpec):
                shape = (num_blocks + 1, block_size, spec.values_per_token)
                self.layers.append({"pages": torch.zeros(shape, dtype=_dtype(spec.dtype), device=device)})
            else:
                self.layers.append(
                    {
                        t.name: torch.zeros((num_slots + 1, *t.shape), dtype=_dtype(t.dtype), device=device)
                        for t in spec.tensors
                    }
                )
        self._states = [t for layer in self.layers for name, t in layer.items() if name != "pages"]

    def reset_slots(self, slots: Tensor) -> None:
        """Zero the state of slots (int64 [n]) that begin a sequence, so that nothing of an earlier one shows."""
        for state in self._states:
            state.index_fill_(0, slots, 0)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
