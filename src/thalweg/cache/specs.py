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


def packs(spec: StateSpec, dtype: str) -> bool:
    """Whether snapshots of a state are stored in `dtype`: of recurrent states (heads, value, key) if that is smaller;
    the inputs that convolutions keep stay as they are."""
    return dtype != "auto" and len(spec.shape) == 3 and _SNAPSHOT_BYTES[dtype] < DTYPE_BYTES[spec.dtype]


_SNAPSHOT_BYTES = {"bfloat16": 2, "int8": 1}
Spec = PagedSpec | StateSpec
LayerSpecs = Mapping[str, Spec]
"""What one layer caches, by names of its own, e.g. {"conv": StateSpec(...), "recurrent": StateSpec(...)}."""


def bytes_per_token(layers: Iterable[LayerSpecs]) -> int:
    """Bytes of paged cache that one more token costs, over all layers."""
    return sum(s.bytes for layer in layers for s in layer.values() if isinstance(s, PagedSpec))


def bytes_per_sequence(layers: Iterable[LayerSpecs]) -> int:
    """Bytes of state that one more sequence costs, over all layers, whatever its length."""
    return sum(s.bytes for layer in layers for s in layer.values() if isinstance(s, StateSpec))


def bytes_per_snapshot(layers: Iterable[LayerSpecs], dtype: str) -> int:
    """Bytes of one snapshot of all states, in bfloat16, int8 or, as "auto", their own dtype."""
    total = 0
    for spec in (s for layer in layers for s in layer.values() if isinstance(s, StateSpec)):
        if not packs(spec, dtype):
            total += spec.bytes
        else:
            total += prod(spec.shape) * _SNAPSHOT_BYTES[dtype]
            total += 4 * spec.shape[0] * (spec.shape[1] + spec.shape[2]) if dtype == "int8" else 0  # scales
    return total
