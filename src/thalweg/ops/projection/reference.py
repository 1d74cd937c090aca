"""Two projections at once in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def batched_projection(x_T2R: Tensor, w_2OR: Tensor) -> Tensor:
    return torch.bmm(x_T2R.transpose(0, 1), w_2OR.transpose(1, 2)).transpose(0, 1)
