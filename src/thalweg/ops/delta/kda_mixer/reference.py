"""The mixers of a KDA layer in plain torch, as the sequence of their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from thalweg.ops.delta.conv1d.reference import conv1d_decode, conv1d_prefill
from thalweg.ops.delta.kda.reference import kda_decode, kda_gate, kda_prefill
from thalweg.ops.host_tables import Boundaries
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


def prefill_by(
    conv: Callable[..., Tensor], gate: Callable[..., Tensor], rule: Callable[..., Tensor], norm: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """ "kda_mixer_prefill" by implementations of its parts."""

    def kda_mixer_prefill(
        proj_TX: Tensor,
        up_T2O: Tensor,
        *,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        A_log_H: Tensor,
        dt_bias_HK: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        boundaries: Boundaries = (),
    ) -> Tensor:
        (H, K), C = dt_bias_HK.shape, conv_weight_CW.shape[0]
        up_T2HK = up_T2O.unflatten(-1, (H, K))  # t two (h k) -> t two h k
        g_THK = gate(up_T2HK[:, 0], A_log_H, dt_bias_HK)
        qkv_TC = conv(proj_TX[:, :C], conv_state_NWC, slots_B, offsets, conv_weight_CW, boundaries=boundaries)
        q_THK, k_THK, v_THV = qkv_TC.unflatten(-1, (3, H, K)).unbind(1)  # t (three h k) -> three t h k
        beta_TH = proj_TX[:, C : C + H].float().sigmoid()
        states = {"state_NHVK": state_NHVK, "slots_B": slots_B, "offsets": offsets, "boundaries": boundaries}
        o_THV = rule(q_THK, k_THK, v_THV, g_THK, beta_TH, **states)
        return norm(o_THV, up_T2HK[:, 1], norm_weight_V, eps).flatten(1)  # t h v -> t (h v)

    return kda_mixer_prefill


kda_mixer_prefill = prefill_by(conv1d_prefill, kda_gate, kda_prefill, gated_rms_norm)
