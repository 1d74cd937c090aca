"""The protocol of schemes, and the scheme that stores weights as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Range = tuple[int, int]  # [start, stop)
Index = int | Range
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor that a stored weight consists of: the parameter's name ends in `suffix`."""

    suffix: str
    shape: Shape
    dtype: str  # "model" follows --dtype


class Scheme(Protocol):
    """How the elements of a weight [..., O, D] are stored. Its parts lie one below the other along O, equally high."""

    @property
    def name(self) -> str:
        """Its name in --quantization and in op dims; "none" for weights in the model's dtype."""

    @property
    def file_dtype(self) -> str | None:
        """The dtype of the first tensor in checkpoints, spelt as safetensors does; None for plain ones."""

    @property
    def packed(self) -> int:
        """Elements in one item of the first tensor."""

    @property
    def as_stored(self) -> bool:
        """Whether `put` takes the bytes of a file instead of elements."""

    @property
    def rate(self) -> float:
        """How many times faster than in 16 bits a matrix unit multiplies, if activations are in this scheme too."""

    def bytes_per_weight(self, model_bytes: int) -> float:
        """Bytes per element, scales included; `model_bytes` is that of --dtype."""

    def stored(self, shape: Shape, parts: int) -> tuple[Stored, ...]:
        """The tensors of a weight of `shape` made of `parts` parts, in the order in which ops take them."""

    def put(self, part: Tensor, into: tuple[Index, ...], stored: Sequence[Tensor]) -> None:
        """Store a part in the model's or the checkpoint's dtype, in place. `into` indexes the leading dimensions of
        the weight, an int picks an entry and a range keeps the dimension; () is all of it."""

    def widened(self, stored: Sequence[Tensor], parts: int, dtype: torch.dtype) -> Tensor:
        """The elements [..., O, D] in `dtype`. The plain scheme ignores `dtype`: they are in the model's already."""

    def rows_of(self, stored: Sequence[Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., D] of ids [...] of a vocabulary's matrix [O, D] in one part; NotImplementedError if vocabularies
        are not stored so."""


class Plain:
    """Weights in the model's dtype: one tensor, no scales."""

    name, file_dtype, packed, as_stored, rate = "none", None, 1, False, 1.0

    def bytes_per_weight(self, model_bytes: int) -> float:
        return float(model_bytes)

    def stored(self, shape: Shape, parts: int) -> tuple[Stored, ...]:
        return (Stored("", shape, "model"),)

    def put(self, part: Tensor, into: tuple[Index, ...], stored: Sequence[Tensor]) -> None:
        place = stored[0][tensor_index(into)]
        place.copy_(part.reshape(place.shape))

    def widened(self, stored: Sequence[Tensor], parts: int, dtype: torch.dtype) -> Tensor:
        return stored[0]

    def rows_of(self, stored: Sequence[Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
        import torch.nn.functional as F

        return F.embedding(ids, stored[0])


PLAIN = Plain()


def tensor_index(into: tuple[Index, ...]) -> tuple[int | slice, ...]:
    """`into` as a tensor takes it; an empty one means the whole."""
    return tuple(i if isinstance(i, int) else slice(*i) for i in into) or (slice(None),)
