"""What every part of a decoder layer says, and what its checkpoint names and costs are told with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from thalweg.errors import ConfigError, UnsupportedError
from thalweg.parallel.placement import Placement
from thalweg.parallel.shards import Shards
from thalweg.quant import FP8_LINEARS, PLAIN, GgmlRows, Scheme
from thalweg.quant.blocks import BLOCK, blocks
from thalweg.quant.ggml import Tile
from thalweg.quant.ggml_types import TYPES
from thalweg.quant.int4 import GROUP, WORD, groups
from thalweg.quant.scheme import Shape
from thalweg.weights.plan import Source, Target, concat, whole

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
    With data-parallel ranks these have `others` more between them.

    `scheme` is what the experts are stored in, `shared` what the shared ones are (None: likewise), `linears` what other
    matrices that checkpoints may quantize are.
    """

    sequences: int
    new: int = 1
    cached: int = 0
    dtype_bytes: int = 2
    state_bytes: int = 4
    scheme: Scheme = PLAIN
    linears: Scheme = PLAIN
    shared: Scheme | None = None
    shards: Shards = WHOLE
    others: int = 0

    @property
    def tokens(self) -> int:
        return self.sequences * self.new

    @property
    def all_tokens(self) -> int:
        """Of all data-parallel ranks."""
        return (self.sequences + self.others) * self.new

    def rate(self, scheme: Scheme) -> float:
        """Of products with weights in `scheme`: activations are quantized in prompts alone, and not in float32."""
        return scheme.rate if self.new > 1 and self.dtype_bytes == 2 else 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that one operation of a step takes on one rank.

    Bytes through device memory, each input read once and each output written once, activations left out (they stay in
    the caches of the chip); floating-point operations, `rate` times as fast as in 16 bits; and bytes that the rank
    sends to others.
    """

    what: str
    bytes: float = 0.0
    flops: float = 0.0
    sent: float = 0.0
    rate: float = 1.0


def product(what: str, elements: float, step: Step, *, rows: int | None = None, scheme: Scheme | None = None) -> Cost:
    """A matrix of `elements`, in `scheme` (None: that of linears), read once and multiplied with `rows` rows (None:
    every token of the step)."""
    scheme = scheme or step.linears
    weight_bytes, flops = (
        scheme.bytes_per_weight(step.dtype_bytes),
        2 * elements * (step.tokens if rows is None else rows),
    )
    return Cost(what, elements * weight_bytes, flops, rate=step.rate(scheme))


def all_reduce(what: str, width: int, step: Step) -> list[Cost]:
    """A sum over ranks of a row of `width` for each token, as a ring sends it."""
    n = step.shards.size
    return [Cost(what, sent=2 * (n - 1) / n * step.tokens * width * step.dtype_bytes)] if n > 1 else []


def exchange(what: str, width: int, taken: int, step: Step) -> list[Cost]:
    """What data-parallel ranks send each other for their tokens, of which each takes so many experts that the ranks
    divide: its row to the other ranks that have one of them, and the sums back from these; both in equal parts."""
    n = step.shards.data_size
    others = (n - 1) * (1 - (1 - 1 / n) ** taken)  # of a token, on average
    sent = 2 * step.all_tokens / n * others * width * step.dtype_bytes
    return [Cost(what, sent=sent)] if n > 1 else []


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What every part's weights depend on: the model's width, this rank's share, how experts are stored, whether
    checkpoints store norm weights less one, and what they store a matrix as ("none": no scheme)."""

    width: int
    shards: Shards = WHOLE
    scheme: Scheme = PLAIN
    shifted_norms: bool = False
    stored_as: Callable[[str], str] = lambda _: "none"
    tiles: Mapping[str, Tile] = field(default_factory=dict)  # of matrices of blocks whose columns are in another order
    halves: bool = False  # matrices of a GGUF file in 16 bits are kept so
    placement: Placement | None = None  # of this layer's experts over data-parallel ranks; None: even

    def experts(self, total: int) -> tuple[int, ...]:
        """This rank's routed experts of `total`. Raises ConfigError if the data-parallel ranks do not divide them."""
        placement = self.placement or Placement.even(total, self.shards.data_size)
        return placement.slots[self.shards.data_rank]

    def norm(self, ours: str, theirs: str, size: int) -> Target:
        """The weight [size] of an RMSNorm. Where one is added to it, it is kept in float32, which loses nothing."""
        if self.shifted_norms:
            return whole(ours, theirs, (size,), dtype="float32", init="zeros", add=1.0)
        return whole(ours, theirs, (size,), init="ones")

    def linear(self, ours: str, *pieces: Source) -> list[Target]:
        """The matrix `ours`.weight of pieces [rows, D] one below the other. If some are in float8 and others not, these
        are `ours`.rest.weight, and must come last. Raises UnsupportedError otherwise, or ConfigError if the ranks cut a
        block of columns."""
        if any(self.block_type(piece.name) != "none" for piece in pieces):
            return [self.in_blocks(concat(f"{ours}.weight", pieces))]
        fp8 = [self._is_fp8(piece.name) for piece in pieces]
        count = sum(fp8)
        if fp8 != sorted(fp8, reverse=True):
            names = ", ".join(piece.name for piece, quantized in zip(pieces, fp8, strict=True) if not quantized)
            raise UnsupportedError(f"{names} not in float8, unlike what it is fused with: expected all or none of them")
        if not count:
            return [concat(f"{ours}.weight", pieces)]
        rest = [concat(f"{ours}.rest.weight", pieces[count:])] if count < len(pieces) else []
        weight = concat(f"{ours}.weight", pieces[:count])
        scales = [replace(fp8_scales(piece), into=piece.into) for piece in weight.sources]
        return [replace(weight, scheme=FP8_LINEARS, scales=tuple(scales)), *rest]

    def block_type(self, name: str) -> str:
        """The type of GGML's that a checkpoint stores a matrix in and that it is kept in; "none" if it is not."""
        kind = TYPES.get(self.stored_as(name))
        return kind.name if kind is not None and kind.is_kept(self.halves) else "none"

    def in_blocks(self, target: Target) -> Target:
        """A matrix kept in blocks, as the checkpoint has it; those of a stack have the same types in each. Without
        blocks `target` as it is. Raises ConfigError if the ranks cut a block."""
        if all(self.block_type(source.name) == "none" for source in target.sources):
            return target
        for source in target.sources:
            self._check_cut(source)
        first = [s for s in target.sources if len(target.shape) == 2 or (s.into and s.into[0] == 0)]
        rows = target.shape[-2]
        segments = [(self.stored_as(s.name), s.local_shape[0]) for s in first]
        left = rows - sum(count for _, count in segments)  # of a vocabulary that the ranks do not divide
        if left:
            segments.append((segments[-1][0], left))
        return replace(target, scheme=GgmlRows.of(segments, self.tiles.get(first[0].name)))

    def _check_cut(self, piece: Source) -> None:
        kind = TYPES[self.stored_as(piece.name)]
        if piece.shard is None or piece.shard_dim != len(piece.shape) - 1:
            return
        start, stop = piece.shard
        whole = (start, stop) == (0, piece.shape[-1])
        if start % kind.elements or stop % kind.elements or (piece.name in self.tiles and not whole):
            raise ConfigError(
                f"--tensor-parallel-size cuts {piece.name} at {start} and {stop}, within a block of {kind.elements}"
                f" ({kind}); choose a size that does not, or --dequantize"
            )

    def widened(self, ours: str, shape: Shape, piece: Source) -> Target:
        """A weight that is kept in the model's dtype, brought to it as it is loaded if the checkpoint has it in
        float8."""
        if self._is_fp8(piece.name):
            piece = replace(piece, scales=fp8_scales(piece))
        return Target(ours, shape, (piece,))

    def _is_fp8(self, name: str) -> bool:
        stored = self.stored_as(name)
        if stored in TYPES:
            return False
        if stored not in ("none", "fp8"):
            raise UnsupportedError(f"{name} is stored in {stored}; expected that of routed experts only")
        return stored == "fp8"


def fp8_scales(piece: Source, *, per_row: bool = True) -> Source:
    """The scales of a float8 matrix [N, D], stored beside it for blocks of 128 x 128: for each row and block of
    columns, or for each block if not `per_row`. Raises ConfigError if it begins within a block that it leaves."""
    rows, cols = (blocks(n) for n in piece.shape)
    name, dim, repeat = f"{piece.name}_scale_inv", piece.shard_dim, BLOCK if per_row else 1
    if piece.shard is None or (per_row and dim == 0):
        return Source(name, (rows, cols), dim, piece.shard, repeat=repeat)
    start, stop = piece.shard
    if start % BLOCK and start // BLOCK != (stop - 1) // BLOCK:
        raise ConfigError(
            f"--tensor-parallel-size cuts {piece.name} at {start}, within a block of {BLOCK} that has one scale;"
            " choose a size that does not"
        )
    return Source(name, (rows, cols), dim, (start // BLOCK, blocks(stop)), repeat=repeat)


def int4_sources(piece: Source) -> tuple[Source, Source]:
    """The packed elements of an int4 matrix [N, D] and their scales. Raises ConfigError if D is not a whole number of
    words, or a rank begins within a word, or within a group that it leaves."""
    rows, cols = piece.shape
    start, stop = piece.shard if piece.shard is not None and piece.shard_dim == 1 else (0, cols)
    if cols % WORD:
        raise ConfigError(f"{piece.name} has {cols} columns; expected a multiple of {WORD} for int4")
    if start % WORD or stop % WORD or (start % GROUP and start // GROUP != (stop - 1) // GROUP):
        raise ConfigError(
            f"--tensor-parallel-size cuts {piece.name} at {start} and {stop}, within a group of {GROUP} that"
            " has one scale; choose a size that does not"
        )
    words, scales = piece.shard, piece.shard
    if piece.shard_dim == 1 and piece.shard is not None:
        words, scales = (start // WORD, stop // WORD), (start // GROUP, groups(stop))
    return (
        replace(piece, name=f"{piece.name}_packed", shape=(rows, cols // WORD), shard=words),
        replace(piece, name=f"{piece.name}_scale", shape=(rows, groups(cols)), shard=scales),
    )


class Part(Protocol):
    """Dimensions of a mixer or a feed-forward block: the whole model's, not a rank's. `width` is the model's."""

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """The weights below parameter `ours` on this rank, its norm included. Raises ConfigError naming
        --tensor-parallel-size if the ranks cannot share a dimension."""

    def costs(self, width: int, step: Step) -> list[Cost]:
        """Every operation of the part in one step of one rank."""
