"""What every part of a decoder layer says, and what its checkpoint names and costs are told with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from thalweg.parallel.shards import Shards
from thalweg.quant import PLAIN, Scheme
from thalweg.weights.plan import Target, whole

Names = Mapping[str, str]
"""A part's pieces ("q", "out", ...) to the names that a family's checkpoints give them."""


def prefixed(prefix: str, names: Names) -> Names:
    """The names with `prefix` before each."""
    return {piece: prefix + name for piece, name in names.items()}


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


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What every part's weights depend on: the model's width, this rank's share, how experts are stored, and whether
    checkpoints store norm weights less one."""

    width: int
    shards: Shards = WHOLE
    scheme: Scheme = PLAIN
    shifted_norms: bool = False

    def norm(self, ours: str, theirs: str, size: int) -> Target:
        """The weight [size] of an RMSNorm. Where one is added to it, it is kept in float32, which loses nothing."""
        if self.shifted_norms:
            return whole(ours, theirs, (size,), dtype="float32", init="zeros", add=1.0)
        return whole(ours, theirs, (size,), init="ones")


class Part(Protocol):
    """Dimensions of a mixer or a feed-forward block: the whole model's, not a rank's. `width` is the model's."""

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """The weights below parameter `ours` on this rank, its norm included. Raises ConfigError naming
        --tensor-parallel-size if the ranks cannot share a dimension."""

    def costs(self, width: int, step: Step) -> list[Cost]:
        """Every operation of the part in one step of one rank."""
