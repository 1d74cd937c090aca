"""What every layer needs to build itself: where it lives, on what dtype, over which ranks, with which ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from thalweg.ops.registry import Op, Resolver, Where
from thalweg.parallel.mesh import Mesh
from thalweg.parallel.shards import Shards
from thalweg.quant import PLAIN, Scheme
from thalweg.quant.scheme import Shape

D = TypeVar("D")
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class BuildContext:
    device: torch.device
    dtype: torch.dtype
    mesh: Mesh
    resolver: Resolver
    state_dtype: str  # that recurrent states are stored in
    scheme: Scheme = PLAIN  # of the experts' weights
    block_size: int = field(kw_only=True)  # tokens in a block of the cache
    norm_fp32: bool = field(default=False, kw_only=True)  # whether the weights of RMSNorms are kept in float32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter; weights/ fills it."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=dtype or self.dtype), requires_grad=False)

    @property
    def where(self) -> Where:
        """On what ops will run."""
        return Where(self.device.type, self.dtype_name)

    def op(self, op: Op[D, F], dims: D) -> F:
        """What serves `op` for these dimensions here."""
        return self.resolver.resolve(op, self.where, dims)

    def stored(self, shape: Shape, parts: int = 1) -> dict[str, nn.Parameter]:
        """Uninitialised parameters of an expert weight of `shape`, by suffix, as the scheme stores it."""
        return {
            s.suffix: self.weight(*s.shape, dtype=None if s.dtype == "model" else getattr(torch, s.dtype))
            for s in self.scheme.stored(shape, parts)
        }

    @property
    def shards(self) -> Shards:
        """This rank's share of dimensions."""
        return Shards(self.mesh.tp_rank, self.mesh.tp_size)


LayerCache = Mapping[str, torch.Tensor]
"""One layer's cache tensors by the names of its specs: [M, S, ...] of a PagedSpec, [slots, ...] of a StateSpec."""
