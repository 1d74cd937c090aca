"""Router and experts of a batch of tokens over fp8, with activations in fp8: norm, choice, rows in float8 and lists of
pairs in one launch in CUDA C++, then gate and up, down, and the sum with the norm behind it in Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from thalweg.ops.moe.experts.triton import narrow
from thalweg.ops.moe.experts.triton.grouping import Lists
from thalweg.ops.moe.routed import RoutedExperts, RoutedExpertsDims
from thalweg.ops.moe.router.cuda import for_experts, norm_router
from thalweg.ops.norm import NextNorm


@cache
def _last_first(experts: int, device: torch.device) -> Tensor:
    return torch.arange(experts - 1, -1, -1, dtype=torch.int32, device=device)


def build(dims: RoutedExpertsDims) -> RoutedExperts:
    """The op for dims that it has nothing against."""
    E, K, S = dims.experts.E, dims.K, dims.S

    def routed_experts(
        x_TD: Tensor,
        apart: Callable[[Tensor], Tensor],
        norm_weight_D: Tensor,
        eps: float,
        router_ED: Tensor,
        bias_E: Tensor,
        gate_up: tuple[Tensor, ...],
        down: tuple[Tensor, ...],
        *,
        router_scale: float,
        own: tuple[Tensor, Tensor] | None,
        scale: float,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        if len(x_TD) == 0:
            return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        found = for_experts(x_TD, E)
        _, weights_Tk, _ = norm_router(
            x_TD,
            norm_weight_D,
            eps,
            router_ED,
            bias_E,
            top_k=K,
            renormalize=dims.renormalize,
            scale=router_scale,
            scoring=dims.scoring,
            num_shared=S,
            more=found,
        )
        lists = Lists(_last_first(E, x_TD.device), found.counts_E, found.lists_ET)
        y_PD = narrow.outputs(found.narrow_TD, found.scales_TB, lists, K + S, gate_up, down)
        return narrow.summed(y_PD, weights_Tk, x_TD, x_TD, next_norm, found.counts_E)

    return routed_experts
