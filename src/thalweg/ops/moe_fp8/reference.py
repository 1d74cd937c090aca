"""Experts in fp8 in plain torch: the experts in use are dequantized, then they are experts as any others."""

from __future__ import annotations

from torch import Tensor

from thalweg.ops.moe import reference
from thalweg.quant.fp8_blocks import dequantize


def experts_fp8(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,  # a promise this definition has no need of
) -> Tensor:
    used, ids_Tk = ids_Tk.unique(return_inverse=True)
    halves = q_gate_up_E2ID[used].unflatten(1, (2, -1))
    gate_up = dequantize(halves, s_gate_up[used].unflatten(1, (2, -1)), x_TD.dtype).flatten(1, 2)
    down = dequantize(q_down_EDI[used], s_down[used], x_TD.dtype)
    return reference.experts(x_TD, weights_Tk, ids_Tk, gate_up, down, residual_TD=residual_TD)
