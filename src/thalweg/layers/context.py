"""What every layer needs to build itself: where it lives, on what dtype, over which ranks, with which ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from thalweg.errors import ConfigError
from thalweg.ops.registry import OpContext, Resolver
from thalweg.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class BuildContext:
    device: torch.device
    dtype: torch.dtype
    mesh: Mesh
    resolver: Resolver
    state_dtype: str  # that recurrent states are stored in
    quantization: str | None = field(default=None, kw_only=True)  # of the experts' weights

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter; weights/ fills it."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=dtype or self.dtype), requires_grad=False)

    def op(self, name: str, **dims: int) -> Callable[..., Any]:
        """The implementation that serves op `name` for these dimensions here."""
        return self.resolver.resolve(name, OpContext(self.device.type, self.dtype_name, dims))

    def shard(self, size: int, what: str) -> int:
        """This rank's share of a dimension of `size`. Raises ConfigError where ranks do not divide it."""
        if size % self.mesh.tp_size:
            raise ConfigError(f"{what} is {size}, which --tensor-parallel-size {self.mesh.tp_size} does not divide")
        return size // self.mesh.tp_size


LayerCache = Mapping[str, torch.Tensor]
"""One layer's cache tensors by the names of its specs: [M, S, ...] of a PagedSpec, [slots, ...] of a StateSpec."""
