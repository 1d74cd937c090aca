"""What a layer caches, as plain data. The cache allocates from these alone and knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from thalweg.quant.dtypes import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPE_BYTES

    def __post_init__(self) -> None:
        """Raises ValueError for a dtype that the cache cannot store."""
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"a cache of dtype {self.dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PagedSpec(_Spec):
    """Values of `shape` kept for every token, in blocks of block_size tokens: a latent (576,), or keys (heads, dim)."""


@dataclass(frozen=True, slots=True)
class StateSpec(_Spec):
    """A tensor of `shape` kept for every sequence, whatever its length: a recurrent state (H, V, K)."""


Spec = PagedSpec | StateSpec
LayerSpecs = Mapping[str, Spec]
"""What one layer caches, by names of its own, e.g. {"conv": StateSpec(...), "recurrent": StateSpec(...)}."""


def bytes_per_token(layers: Iterable[LayerSpecs]) -> int:
    """Bytes of paged cache that one more token costs, over all layers."""
    return sum(s.bytes for layer in layers for s in layer.values() if isinstance(s, PagedSpec))


def bytes_per_sequence(layers: Iterable[LayerSpecs]) -> int:
    """Bytes of state that one more sequence costs, over all layers, whatever its length."""
    return sum(s.bytes for layer in layers for s in layer.values() if isinstance(s, StateSpec))
