"""A linear projection by the library, the norm ahead by a kernel of our own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.norm.triton.rms import rms_norm


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return F.linear(rms_norm(x_TD, norm_weight_D, eps), w_OD)
