"""What every layer needs to build itself: where it lives, on what dtype, over which ranks, with which ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from thalweg.ops.registry import Op, Resolver, Where
from thalweg.parallel.mesh import Mesh
from thalweg.parallel.placement import Placement
from thalweg.parallel.shards import Shards
from thalweg.quant import PLAIN
from thalweg.quant.scheme import Shape
from thalweg.weights.memory import WeightMemory
from thalweg.weights.plan import Target

D = TypeVar("D")
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class BuildContext:
    device: torch.device
    dtype: torch.dtype
    mesh: Mesh
    resolver: Resolver
    state_dtype: str  # that recurrent states are stored in
    plan: Mapping[str, Target] = field(default_factory=dict)  # this rank's weights; without one all are plain
    block_size: int = field(kw_only=True)  # tokens in a block of the cache
    path: str = field(default="", kw_only=True)  # of the module that is being built, "layers.0.attn." or so
    norm_fp32: bool = field(default=False, kw_only=True)  # whether the weights of RMSNorms are kept in float32
    placements: Mapping[int, Placement] = field(default_factory=dict, kw_only=True)  # of layers with an uneven one
    memory: WeightMemory = field(default_factory=WeightMemory, kw_only=True)  # for weights on a CPU

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter; weights/ fills it."""
        dtype = dtype or self.dtype
        if self.device.type == "cpu":
            return nn.Parameter(self.memory.empty(shape, dtype), requires_grad=False)
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=dtype), requires_grad=False)

    @property
    def where(self) -> Where:
        """On what ops will run."""
        return Where(self.device.type, self.dtype_name)

    def op(self, op: Op[D, F], dims: D) -> F:
        """What serves `op` for these dimensions here."""
        return self.resolver.resolve(op, self.where, dims)

    def below(self, name: str) -> BuildContext:
        """For the child `name` of the module that is being built."""
        return replace(self, path=f"{self.path}{name}.")

    def __contains__(self, name: str) -> bool:
        """Whether the plan has weight `name` of this module."""
        return self.path + name in self.plan

    def planned(self, name: str) -> Target | None:
        """What the plan says of weight `name` of this module, if it is not stored in the model's dtype."""
        target = self.plan.get(self.path + name)
        return None if target is None or target.scheme is PLAIN else target

    def stored(self, name: str, shape: Shape) -> dict[str, nn.Parameter]:
        """Uninitialised parameters of weight `name` of `shape`, by their names, as the plan stores it."""
        target = self.planned(name)
        if target is None:
            return {name: self.weight(*shape)}
        dtypes = {s.suffix: None if s.dtype == "model" else getattr(torch, s.dtype) for s in target.parameters}
        return {name + s.suffix: self.weight(*s.shape, dtype=dtypes[s.suffix]) for s in target.parameters}

    def placement(self, experts: int) -> Placement:
        """Of the routed experts of the layer that is being built."""
        layer = int(self.path.split(".")[1]) if self.path.startswith("layers.") else -1
        return self.placements.get(layer) or Placement.even(experts, self.mesh.data.size)

    @property
    def shards(self) -> Shards:
        """This rank's share of dimensions."""
        return Shards(self.mesh.tp_rank, self.mesh.tp_size, self.mesh.data.rank, self.mesh.data.size)


LayerCache = Mapping[str, torch.Tensor]
"""One layer's cache tensors by the names of its specs: [M, S, ...] of a PagedSpec, [slots, ...] of a StateSpec."""
