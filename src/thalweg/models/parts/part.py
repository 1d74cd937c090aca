"""What every part of a decoder layer says, and what its checkpoint names and costs are told with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from thalweg.parallel.shards import Shards
from thalweg.quant import PLAIN, Scheme
from thalweg.weights.plan import Target

Names = Mapping[str, str]
"""A part's pieces ("q", "out", ...) to the names that a family's checkpoints give them."""

# Bounds keep a hostile config from costing memory before its checkpoint is looked at.
MAX_LAYERS = 1_000
MAX_DIM = 2**24
MAX_EXPERTS = 2**16


WHOLE = Shards()


@dataclass(frozen=True, slots=True)
class Step:
    """A step to count: `sequences` rows that each add `new` tokens to `cached` ones, on one of `shards.size` ranks.

    `scheme` is what the experts are stored in.
    """

    sequences: int
    new: int = 1
    cached: int = 0
    dtype_bytes: int = 2
    state_bytes: int = 4
    scheme: Scheme = PLAIN
    shards: Shards = WHOLE

    @property
    def tokens(self) -> int:
        return self.sequences * self.new


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that one operation of a step takes on one rank.

    Bytes through device memory, each input read once and each output written once, activations left out (they stay in
    the caches of the chip); floating-point operations; and bytes that the rank sends to others.
    """

    what: str
    bytes: float = 0.0
    flops: float = 0.0
    sent: float = 0.0


def product(what: str, elements: float, step: Step, *, rows: int | None = None) -> Cost:
    """A matrix of `elements` read once and multiplied with `rows` rows (None: every token of the step)."""
    return Cost(what, elements * step.dtype_bytes, 2 * elements * (step.tokens if rows is None else rows))


def all_reduce(what: str, width: int, step: Step) -> list[Cost]:
    """A sum over ranks of a row of `width` for each token, as a ring sends it."""
    n = step.shards.size
    return [Cost(what, sent=2 * (n - 1) / n * step.tokens * width * step.dtype_bytes)] if n > 1 else []


class Part(Protocol):
    """Dimensions of a mixer or a feed-forward block: the whole model's, not a rank's. `width` is the model's."""

    def targets(self, ours: str, names: Names, width: int, shards: Shards, scheme: Scheme) -> list[Target]:
        """The weights below parameter `ours` on this rank, its norm included. Raises ConfigError naming
        --tensor-parallel-size if the ranks cannot share a dimension. `scheme` is that of experts' weights."""

    def costs(self, width: int, step: Step) -> list[Cost]:
        """Every operation of the part in one step of one rank."""
