"""The split and its two norms in plain torch."""

from __future__ import annotations

from torch import Tensor

from thalweg.ops.norm.reference import rms_norm


def split_norms(x_TX: Tensor, q_weight_Q: Tensor, kv_weight_R: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    Q, R = len(q_weight_Q), len(kv_weight_R)
    q_TQ, latent_TR, shared_TP = x_TX.split([Q, R, x_TX.shape[-1] - Q - R], dim=-1)
    return rms_norm(q_TQ, q_weight_Q, eps), rms_norm(latent_TR, kv_weight_R, eps), shared_TP
