"""RMS norms in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def _rms_norm_fp32(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TD.float(), weight_D.shape, weight_D.float(), eps)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _rms_norm_fp32(x_TD, weight_D, eps).to(x_TD.dtype)


def gated_rms_norm(o_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float, *, silu: bool = False) -> Tensor:
    gate_THV = gate_THV.float()
    gate_THV = F.silu(gate_THV) if silu else gate_THV.sigmoid()
    return (_rms_norm_fp32(o_THV, weight_V, eps) * gate_THV).to(o_THV.dtype)
