"""Rotation of neighbouring pairs in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_rope(q_THX: Tensor, *, positions_T: Tensor, frequencies_F: Tensor, rope_scale: float) -> None:
    turning_THP = q_THX[..., q_THX.shape[-1] - 2 * len(frequencies_F) :]
    turning_THP.copy_(turned(turning_THP, positions_T, frequencies_F, rope_scale))


def turned(x_THP: Tensor, positions_T: Tensor, frequencies_F: Tensor, rope_scale: float) -> Tensor:
    """x in its dtype, rotated, as op "mla_rope" says."""
    angles_T1F = (positions_T.unsqueeze(1).float() * frequencies_F).unsqueeze(1)
    cos_T1F, sin_T1F = angles_T1F.cos() * rope_scale, angles_T1F.sin() * rope_scale
    even, odd = x_THP.float().unflatten(-1, (-1, 2)).unbind(-1)
    y_THP = torch.stack((even * cos_T1F - odd * sin_T1F, odd * cos_T1F + even * sin_T1F), dim=-1).flatten(-2)
    return y_THP.to(x_THP.dtype)
