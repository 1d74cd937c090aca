"""SwiGLU activation in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x_T2I: Tensor) -> Tensor:
    gate_TI, up_TI = x_T2I.float().chunk(2, dim=-1)
    return (F.silu(gate_TI) * up_TI).to(x_T2I.dtype)
