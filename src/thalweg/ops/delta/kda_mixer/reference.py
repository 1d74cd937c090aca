"""The decode mixer of a KDA layer in plain torch, as the sequence of its parts."""

from __future__ import annotations

from torch import Tensor

from thalweg.ops.delta.conv1d.reference import conv1d_decode
from thalweg.ops.delta.kda.reference import kda_decode, kda_gate
from thalweg.ops.norm.reference import gated_rms_norm
from thalweg.ops.projection.reference import batched_projection


def kda_mixer_decode(
    proj_BX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    w_up_2OR: Tensor,
    A_log_H: Tensor,
    dt_bias_HK: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> Tensor:
    (H, K), C, R = dt_bias_HK.shape, conv_weight_CW.shape[0], w_up_2OR.shape[-1]
    qkv_BC, beta_BH, low_B2R = proj_BX.split([C, H, 2 * R], dim=-1)
    # b (two r) -> b two r, and after it b two (h k) -> b two h k
    up_B2HK = batched_projection(low_B2R.unflatten(-1, (2, R)), w_up_2OR).unflatten(-1, (H, K))
    g_BHK = kda_gate(up_B2HK[:, 0], A_log_H, dt_bias_HK)
    qkv_B3HK = conv1d_decode(qkv_BC, conv_state_NWC, slots_B, conv_weight_CW).unflatten(-1, (3, H, K))
    q_BHK, k_BHK, v_BHV = qkv_B3HK.unbind(1)  # b (three h k) -> three b h k
    o_BHV = kda_decode(q_BHK, k_BHK, v_BHV, g_BHK, beta_BH.float().sigmoid(), state_NHVK, slots_B)
    return gated_rms_norm(o_BHV, up_B2HK[:, 1], norm_weight_V, eps).flatten(1)  # b h v -> b (h v)
