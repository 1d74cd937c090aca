"""Two norms, a rotation and a write in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.attention.mla.reference import mla_write
from thalweg.ops.attention.mla_rope.reference import turned
from thalweg.ops.norm.reference import rms_norm


def split_norms(
    x_TX: Tensor,
    q_weight_Q: Tensor | None,
    kv_weight_R: Tensor,
    eps: float,
    *,
    positions_T: Tensor,
    frequencies_F: Tensor,
    rope_scale: float,
    blocks_MSC: Tensor,
    block_rows_T: Tensor,
) -> Tensor:
    Q = 0 if q_weight_Q is None else len(q_weight_Q)
    R = len(kv_weight_R)
    q_TQ, c_TR, shared_TP = x_TX[:, :Q], x_TX[:, Q : Q + R], x_TX[:, Q + R :]
    if len(frequencies_F):
        shared_TP = turned(shared_TP.unsqueeze(1), positions_T, frequencies_F, rope_scale).squeeze(1)
    mla_write(torch.cat([rms_norm(c_TR, kv_weight_R, eps), shared_TP], dim=-1), blocks_MSC, block_rows_T)
    return q_TQ if q_weight_Q is None else rms_norm(q_TQ, q_weight_Q, eps)
