"""Norm and router of one token within the experts' first launch in CUDA C++ (ops/moe/experts/routing.cuh)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.ops.moe.experts import cuda_fp8, cuda_int4, steps_per_warp
from thalweg.ops.moe.routed import ROUTER_ROWS, RoutedExperts, RoutedExpertsDims
from thalweg.ops.norm import NextNorm
from thalweg.ops.registry import Refusal
from thalweg.ops.toolchain.cuda_build import aligned_rows
from thalweg.ops.toolchain.triton_support import processors_here

SHARED = 226 * 1024  # bytes of shared memory that a block may ask for


def refusal(dims: RoutedExpertsDims) -> Refusal:
    """Why the kernels, which serve these experts, have no router for them, or None."""
    of, E = dims.experts, dims.experts.E - dims.S
    blocks = processors_here()
    if ROUTER_ROWS * blocks < E:
        return f"needs at most {ROUTER_ROWS} experts for each of {blocks} multiprocessors, not {E}"
    if of.scheme == "int4":
        return None if of.own else "needs the expert that every token takes to be an own one, beside those in int4"
    # A block begins with a part of the shared expert, and has a multiprocessor to itself.
    if (steps_per_warp(of.D) or 0) % 2 or cuda_fp8.blocks_of(of.D, blocks) > of.I // 8:
        return f"needs columns for warps of an even number of steps and experts wide enough, not {of.D} and {of.I}"
    if cuda_fp8.one_shared_bytes(of.I, dims.K + dims.S) > SHARED:
        return f"has no room for {dims.K + dims.S} rows of {of.I} columns"
    return None


def build(dims: RoutedExpertsDims) -> RoutedExperts:
    """The op for dims that `refusal` has nothing against."""
    K, int4, num_shared = dims.K, dims.experts.scheme == "int4", dims.S

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
        next_norm: NextNorm | None = None,  # not computed
    ) -> Tensor:
        if len(x_TD) == 0:
            return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        x_TD = aligned_rows(x_TD)
        router = (norm_weight_D, eps, router_ED, bias_E, K, router_scale)
        (first, first_scales), (second, second_scales) = gate_up, down
        if int4:
            assert own is not None
            h, weights_Tk, ids_Tk = cuda_int4.run_routed_gate_up(x_TD, *router, first, first_scales, own)
            return cuda_int4.run_down(h, ids_Tk, second, second_scales, own, weights_Tk, x_TD, scale)
        h, weights_Tk, ids_Tk = cuda_fp8.run_routed_gate_up(x_TD, *router, first, first_scales, num_shared=num_shared)
        return cuda_fp8.run_down_of_one(h, ids_Tk, second, second_scales, weights_Tk, x_TD)

    return routed_experts
