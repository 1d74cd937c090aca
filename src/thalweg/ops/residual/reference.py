"""A scaled addition and residual additions in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_residual_add(residual_TD: Tensor, a_TD: Tensor, b_TD: Tensor, scale: float) -> Tensor:
    # In fp32 outright: in bf16 on a CPU, torch rounds the scale itself to bf16.
    return residual_TD + torch.add(a_TD.float(), b_TD.float(), alpha=scale).to(a_TD.dtype)


def two_additions(residual_TD: Tensor, a_TD: Tensor, b_TD: Tensor, scale: float) -> Tensor:
    """What the one pass is timed against: torch's own, whose scale is rounded to bf16 on a CPU."""
    return residual_TD + torch.add(a_TD, b_TD, alpha=scale)


def gated_add(residual_TD: Tensor, a_TD: Tensor, gate_T1: Tensor | None) -> Tensor:
    return residual_TD + (a_TD if gate_T1 is None else a_TD * gate_T1.sigmoid())
