"""What a case is: some implementations of one thing, arguments for them, and the traffic none can do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from thalweg.bench.kernels.shape import Shape
from thalweg.ops.registry import OpContext, implementations


@dataclass(frozen=True, slots=True)
class Setting:
    """Where cases run, and how large they are. `context` counts cached tokens (decode) or new ones (prefill)."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    batch_sizes: tuple[int, ...]
    context: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Draw:
    """Normal random tensors for one copy of a case's arguments; the same copy is drawn alike again."""

    def __init__(self, setting: Setting, copy: int) -> None:
        self.setting, self.rng = setting, torch.Generator(setting.device).manual_seed(copy)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype, device = dtype or self.setting.dtype, self.setting.device
        return torch.randn(shape, generator=self.rng, device=device, dtype=dtype).mul_(scale)

    def order(self, n: int) -> Tensor:
        """The integers 1 .. n, shuffled: slots or pages, of which 0 belongs to nobody. int64 [n]."""
        return torch.randperm(n, generator=self.rng, device=self.setting.device) + 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation. `refusal` says why it cannot run here; capturable=False keeps it out of CUDA graphs."""

    name: str
    fn: Callable[..., Any]
    refusal: str | None = None
    capturable: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """Candidates take the arguments that `make(copy)` returns; `changed` picks from those what they change in place.

    The first candidate that can run is what the others' results are checked against; `same_bits_as` names the one whose
    bits theirs are compared with, where it is another. num_bytes and flops are those of one call.

    timed: "graph" in a CUDA graph where there are such, "eager" one call after another, "host" the processor's time of
    a call that gives the device nothing to do.
    """

    op: str
    label: str
    candidates: tuple[Candidate, ...]
    make: Callable[[int], tuple[Any, ...]]
    num_bytes: float = 0.0
    flops: float = 0.0
    changed: Callable[[tuple[Any, ...]], tuple[Tensor, ...]] = lambda _: ()
    same_bits_as: str | None = None
    timed: Literal["graph", "eager", "host"] = "graph"


Builder = Callable[[Setting], Iterator[Case]]
"""The cases of one op, made one at a time: each holds its tensors only as long as it is looked at."""


def candidates_of(setting: Setting, op: str, dims: Mapping[str, int]) -> tuple[Candidate, ...]:
    """The registered implementations of `op`, the reference first, with their reasons where they refuse."""
    context = OpContext(setting.device.type, setting.dtype_name, dims)
    return tuple(Candidate(i.name, i.fn, i.supports(context), i.capturable) for i in reversed(implementations(op)))
