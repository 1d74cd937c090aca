"""The own expert as an MLP by itself, and the additions apart: what having them in the experts' launches is timed
against (--op experts=separate)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.activation import SILU_AND_MUL, SiluAndMulDims
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.residual import SCALED_RESIDUAL_ADD, ScaledResidualAddDims


def build(where: Where, dims: ExpertsDims) -> Callable[..., Tensor]:
    """Of the best implementations of the parts, but for the additions, which are torch's."""
    resolver = Resolver({SCALED_RESIDUAL_ADD.name: "separate"})
    routed = resolver.resolve(EXPERTS, where, replace(dims, own=0))
    act = resolver.resolve(SILU_AND_MUL, where, SiluAndMulDims(I=dims.own))
    add = resolver.resolve(SCALED_RESIDUAL_ADD, where, ScaledResidualAddDims(D=dims.D))

    def experts(
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        gate_up: tuple[Tensor, ...],
        down: tuple[Tensor, ...],
        *,
        residual_TD: Tensor | None = None,
        num_shared: int = 0,
        own: tuple[Tensor, Tensor] | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        assert own is not None
        own_TD = F.linear(act(F.linear(x_TD, own[0])), own[1])
        routed_TD = routed(x_TD, weights_Tk, ids_Tk, gate_up, down, num_shared=num_shared)
        return own_TD.add(routed_TD, alpha=scale) if residual_TD is None else add(residual_TD, own_TD, routed_TD, scale)

    return experts
