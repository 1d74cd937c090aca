"""Linear projection in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return F.linear(x_TD, w_OD)
