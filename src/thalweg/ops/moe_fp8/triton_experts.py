"""Experts in fp8: which kernels serve how many tokens, and the weighted sum that ops/moe/ has for all kinds of them."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.moe.triton_finish import weighted_sum
from thalweg.ops.moe_fp8.triton_grouped import experts_grouped
from thalweg.ops.moe_fp8.triton_pairs import run_down_pairs, run_gate_up_pairs
from thalweg.ops.moe_fp8.triton_tiles import run_down_tiles, run_gate_up_tiles, run_lists

GEMV_TOKENS = 4
MAX_TOKENS = 256


def experts_fp8(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    num_shared: int = 0,
) -> Tensor:
    if x_TD.shape[0] == 0:
        return torch.empty_like(x_TD)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    quantized = (q_gate_up_E2ID, s_gate_up, q_down_EDI, s_down, num_shared)
    if x_TD.shape[0] > MAX_TOKENS:
        return experts_grouped(x_TD, weights_Tk, ids_Tk, *quantized)
    return weighted_sum(_pair_outputs(x_TD, ids_Tk, *quantized), weights_Tk, x_TD.dtype)


def experts_fp8_add(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    residual_TD: Tensor,
    num_shared: int = 0,
) -> Tensor:
    quantized = (q_gate_up_E2ID, s_gate_up, q_down_EDI, s_down, num_shared)
    if not 0 < x_TD.shape[0] <= MAX_TOKENS or x_TD.stride(1) != 1 or residual_TD.stride(1) != 1:
        return residual_TD + experts_fp8(x_TD, weights_Tk, ids_Tk, *quantized)
    return weighted_sum(_pair_outputs(x_TD, ids_Tk, *quantized), weights_Tk, x_TD.dtype, residual_TD)


def _pair_outputs(
    x_TD: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    num_shared: int,
) -> Tensor:
    """Every pair's output in fp32 [T * k, D], not yet weighted."""
    (T, k), E = ids_Tk.shape, len(q_down_EDI)
    if T <= GEMV_TOKENS:
        h_PI = run_gate_up_pairs(x_TD, ids_Tk, q_gate_up_E2ID, s_gate_up, num_shared)
        return run_down_pairs(h_PI, ids_Tk, q_down_EDI, s_down)
    lists = run_lists(x_TD, ids_Tk, E)
    return run_down_tiles(run_gate_up_tiles(x_TD, lists, k, q_gate_up_E2ID, s_gate_up), lists, q_down_EDI, s_down)
