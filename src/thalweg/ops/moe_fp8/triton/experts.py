"""Experts in fp8 of pairs and of tiles, ended by the weighted sum that ops/moe/ has for all kinds of them."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.moe.triton.finish import weighted_sum
from thalweg.ops.moe_fp8.triton.pairs import run_down_pairs, run_gate_up_pairs
from thalweg.ops.moe_fp8.triton.tiles import run_down_tiles, run_gate_up_tiles, run_lists


def experts_of_pairs(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    if len(x_TD) == 0:
        return torch.empty_like(x_TD)
    h_PI = run_gate_up_pairs(x_TD, ids_Tk, q_gate_up_E2ID, s_gate_up, num_shared)
    y_PD = run_down_pairs(h_PI, ids_Tk, q_down_EDI, s_down)
    return weighted_sum(y_PD, weights_Tk, x_TD.dtype, residual_TD)


def experts_of_tiles(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    if len(x_TD) == 0:
        return torch.empty_like(x_TD)
    lists = run_lists(x_TD, ids_Tk, len(q_down_EDI))
    h_PI = run_gate_up_tiles(x_TD, lists, ids_Tk.shape[1], q_gate_up_E2ID, s_gate_up)
    return weighted_sum(run_down_tiles(h_PI, lists, q_down_EDI, s_down), weights_Tk, x_TD.dtype, residual_TD)
