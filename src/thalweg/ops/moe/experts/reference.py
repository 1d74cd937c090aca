"""Routed experts in plain torch: the experts in use are brought to x's dtype one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.activation.reference import silu_and_mul
from thalweg.ops.residual.reference import scaled_residual_add
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
    down_scheme: Scheme | None = None,  # None: as gate_up
    num_shared: int = 0,  # a promise this definition has no need of
    own: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    if own is not None:
        routed_TD = experts(scheme, x_TD, weights_Tk, ids_Tk, gate_up, down, down_scheme=down_scheme)
        own_TD = F.linear(silu_and_mul(F.linear(x_TD, own[0])), own[1])
        residual_TD = torch.zeros_like(own_TD) if residual_TD is None else residual_TD
        return scaled_residual_add(residual_TD, own_TD, routed_TD, scale)
    T, k = ids_Tk.shape
    if T == 0:
        return torch.empty_like(x_TD)
    # Sort the T * k (token, expert) pairs by expert, so that each expert in use takes one slice.
    order_P = ids_Tk.flatten().argsort(stable=True)
    first, *counts = (ids_Tk.flatten().clamp(min=-1) + 1).bincount().tolist()
    order_P = order_P[first:]  # without the pairs that are left out
    used = [e for e, n in enumerate(counts) if n]
    if not used:
        return torch.zeros_like(x_TD) if residual_TD is None else residual_TD.clone()
    sizes = [counts[e] for e in used]

    def products(x_PD: Tensor, stored: tuple[Tensor, ...], scheme: Scheme, parts: int) -> Tensor:
        """Each expert's slice of the sorted pairs times its matrix; one matrix at a time is in x's dtype."""
        slices = zip(used, x_PD.split(sizes), strict=True)
        return torch.cat([F.linear(x, scheme.widened([t[e] for t in stored], parts, x.dtype)) for e, x in slices])

    sorted_PD = products(silu_and_mul(products(x_TD[order_P // k], gate_up, scheme, 2)), down, down_scheme or scheme, 1)

    # Back to token order rather than index_add: the sum then has one fixed order on every device.
    y_PD = torch.zeros(T * k, sorted_PD.shape[1], device=x_TD.device)
    y_PD[order_P] = sorted_PD.float()
    y_TD = (y_PD.view(T, k, -1) * weights_Tk.float().unsqueeze(-1)).sum(1).to(x_TD.dtype)
    return y_TD if residual_TD is None else residual_TD + y_TD
