"""What a case is: some implementations of one thing, arguments for them, and the traffic none can do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from thalweg.bench.kernels.model import ModelOps
from thalweg.ops.registry import Op, Where, implementations

D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where cases run, and how large they are. `context` counts cached tokens (decode) or new ones (prefill)."""

    device: torch.device
    dtype: torch.dtype
    model: ModelOps
    batch_sizes: tuple[int, ...]
    context: int
    prompts: bool = False  # whether a sequence has `context` tokens in a call, and not one

    @property
    def timed(self) -> Literal["graph", "eager"]:
        return "eager" if self.prompts else "graph"

    def calls(self) -> Iterator[tuple[int, int, str]]:
        """(sequences, their tokens together, a label) of each call."""
        for B in self.batch_sizes:
            T = B * self.context if self.prompts else B
            yield B, T, f"{B} x {self.context} tokens" if self.prompts else f"batch {B}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def where(self) -> Where:
        return Where(self.device.type, self.dtype_name)


class Draw:
    """Normal random tensors for one copy of a case's arguments; the same copy is drawn alike again."""

    def __init__(self, setting: Setting, copy: int) -> None:
        self.setting, self.rng = setting, torch.Generator(setting.device).manual_seed(copy)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype, device = dtype or self.setting.dtype, self.setting.device
        return torch.randn(shape, generator=self.rng, device=device, dtype=dtype).mul_(scale)

    def bits(self, *shape: int) -> Tensor:
        """Random int32."""
        bounds = torch.iinfo(torch.int32)
        device = self.setting.device
        return torch.randint(bounds.min, bounds.max, shape, generator=self.rng, device=device, dtype=torch.int32)

    def order(self, n: int) -> Tensor:
        """The integers 1 .. n, shuffled: slots or blocks, of which 0 belongs to nobody. int64 [n]."""
        return torch.randperm(n, generator=self.rng, device=self.setting.device) + 1


class Arguments:
    """Of a call: positional ones, and those by name."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.args, self.named = args, named

    def of(self, fn: Callable[..., Any]) -> Callable[[], Any]:
        """The call of `fn` with these."""
        return partial(fn, *self.args, **self.named)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation. `refusal` says why it cannot run here; capturable=False keeps it out of CUDA graphs."""

    name: str
    fn: Callable[..., Any]
    refusal: str | None = None
    capturable: bool = True
    serves: bool = False  # whether the model runs it
    rounding: float = 0.0  # that it does beside the dtype's


@dataclass(frozen=True, slots=True)
class Case:
    """Candidates take the arguments that `make(copy)` returns; `changed` picks from those what they change in place.

    The first candidate that can run is what the others' results are checked against; `same_bits_as` names the one whose
    bits theirs are compared with, where it is another. num_bytes and flops are those of one call; `rate` is how many
    times faster than the machine's measured products these may be, on operands of fewer bits.

    timed: "graph" in a CUDA graph where there are such, "eager" one call after another, "host" the processor's time of
    a call that gives the device nothing to do.

    published: figures of the same comparison from elsewhere, on another machine.
    """

    op: str
    label: str
    candidates: tuple[Candidate, ...]
    make: Callable[[int], Arguments]
    num_bytes: float = 0.0
    flops: float = 0.0
    rate: float = 1.0
    changed: Callable[[Arguments], tuple[Tensor, ...]] = lambda _: ()
    same_bits_as: str | None = None
    timed: Literal["graph", "eager", "host"] = "graph"
    published: str = ""


Maker = Callable[[Setting, Any], Iterator[Case]]
"""The cases of an op with these dims, made one at a time: each holds its tensors only as long as it is looked at."""

Builder = Callable[[Setting], Iterator[Case]]
"""The cases of one op of a suite, likewise."""


def candidates_of(setting: Setting, op: Op[D, Any], dims: D, tokens: int) -> tuple[Candidate, ...]:
    """The registered implementations of `op`, the reference first, with their reasons where they refuse."""
    found = sorted(implementations(op.name), key=lambda i: (i.name != "reference", i.priority))
    candidates, serving = [], setting.model.serving(op, dims, tokens)
    for i in found:
        refusal, serves = i.supports(setting.where, dims), i.tokens(dims)
        if refusal is None and tokens not in serves:
            refusal = f"serves {serves} tokens, not {tokens}"
        fn = i.build(setting.where, dims) if refusal is None else _refused
        candidates.append(Candidate(i.name, fn, refusal, i.capturable, i.name == serving, i.rounding))
    return tuple(candidates)


def _refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("a candidate that refuses was called")
