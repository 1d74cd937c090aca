"""Routed experts in plain torch: the experts in use are brought to x's dtype one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.activation.reference import silu_and_mul
from thalweg.quant import Scheme


def experts(
    scheme: Scheme,
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,  # a promise this definition has no need of
) -> Tensor:
    T, k = ids_Tk.shape
    if T == 0:
        return torch.empty_like(x_TD)
    # Sort the T * k (token, expert) pairs by expert, so that each expert in use takes one slice.
    order_P = ids_Tk.flatten().argsort(stable=True)
    counts = ids_Tk.flatten().bincount().tolist()
    used = [e for e, n in enumerate(counts) if n]
    x_by_expert = x_TD[order_P // k].split([counts[e] for e in used])
    sorted_PD = torch.cat([_expert(scheme, x, gate_up, down, e) for e, x in zip(used, x_by_expert, strict=True)])

    # Back to token order rather than index_add: the sum then has one fixed order on every device.
    y_PD = torch.empty_like(sorted_PD, dtype=torch.float32)
    y_PD[order_P] = sorted_PD.float()
    y_TD = (y_PD.view(T, k, -1) * weights_Tk.float().unsqueeze(-1)).sum(1).to(x_TD.dtype)
    return y_TD if residual_TD is None else residual_TD + y_TD


def _expert(scheme: Scheme, x_ND: Tensor, gate_up: tuple[Tensor, ...], down: tuple[Tensor, ...], e: int) -> Tensor:
    w_2ID = scheme.widened([t[e] for t in gate_up], 2, x_ND.dtype)
    w_DI = scheme.widened([t[e] for t in down], 1, x_ND.dtype)
    return F.linear(silu_and_mul(F.linear(x_ND, w_2ID)), w_DI)
