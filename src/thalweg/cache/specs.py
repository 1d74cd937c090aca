"""What a layer caches, as plain data. The cache allocates from these alone and knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class PagedSpec:
    """Values kept for every token, in pages of block_size tokens: an MLA latent, or keys and values."""

    values_per_token: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        return self.values_per_token * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One fixed-size tensor per sequence, e.g. ("recurrent", (H, V, K), "float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Fixed-size recurrent and convolution state kept for every sequence, whatever its length."""

    tensors: tuple[StateTensor, ...]

    @property
    def bytes_per_sequence(self) -> int:
        return sum(t.bytes for t in self.tensors)


LayerSpec = PagedSpec | StateSpec


def bytes_per_token(specs: list[LayerSpec]) -> int:
    """Bytes of paged cache one more token costs, over all layers."""
    return sum(s.bytes_per_token for s in specs if isinstance(s, PagedSpec))


def bytes_per_sequence(specs: list[LayerSpec]) -> int:
    """Bytes of state one more sequence costs, over all layers, whatever its length."""
    return sum(s.bytes_per_sequence for s in specs if isinstance(s, StateSpec))
