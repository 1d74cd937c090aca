"""Rotation of neighbouring pairs in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_rope(
    q_THX: Tensor, shared_TP: Tensor, *, positions_T: Tensor, frequencies_F: Tensor, rope_scale: float
) -> None:
    angles_TF = positions_T.unsqueeze(1).float() * frequencies_F
    cos_TF, sin_TF = angles_TF.cos() * rope_scale, angles_TF.sin() * rope_scale
    P = shared_TP.shape[-1]
    _rotate(q_THX[..., q_THX.shape[-1] - P :], cos_TF.unsqueeze(1), sin_TF.unsqueeze(1))
    _rotate(shared_TP, cos_TF, sin_TF)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    x.copy_(torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2))
