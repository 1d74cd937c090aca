"""Gated DeltaNet in plain torch: KDA's delta rule with a head's decay for all its channels and repeated key heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.delta.conv1d.reference import conv1d_decode, conv1d_prefill
from thalweg.ops.delta.kda.reference import kda_decode, kda_prefill
from thalweg.ops.host_tables import Boundaries
from thalweg.ops.norm.reference import gated_rms_norm


def decay(a_TH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> Tensor:
    """g_TH fp32: the log decay."""
    return -A_log_H.float().exp() * F.softplus(a_TH.float() + dt_bias_H.float())


def prefill_by(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The delta rule of prompts, of repeated key heads and a head's decay for all its channels, by `kda_prefill`.

    gdn_prefill(q_TGK, k_TGK, v_THV, a_TH, b_TH, *, A_log_H, dt_bias_H, ...) gives o_THV. g and beta are in fp32.
    """

    def gdn_prefill(
        q_TGK: Tensor,
        k_TGK: Tensor,
        v_THV: Tensor,
        a_TH: Tensor,
        b_TH: Tensor,
        *,
        A_log_H: Tensor,
        dt_bias_H: Tensor,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        boundaries: Boundaries = (),
    ) -> Tensor:
        ratio, K = v_THV.shape[1] // q_TGK.shape[1], q_TGK.shape[2]
        q_THK, k_THK = q_TGK.repeat_interleave(ratio, 1), k_TGK.repeat_interleave(ratio, 1)  # t g k -> t (g r) k
        g_THK = decay(a_TH, A_log_H, dt_bias_H).unsqueeze(-1).expand(-1, -1, K)
        beta_TH = b_TH.float().sigmoid()
        states = {"state_NHVK": state_NHVK, "slots_B": slots_B, "offsets": offsets, "boundaries": boundaries}
        return rule(q_THK, k_THK, v_THV, g_THK, beta_TH, **states)

    return gdn_prefill


gdn_prefill = prefill_by(kda_prefill)


def gdn_mixer_decode(
    proj_BX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> Tensor:
    C, (H, V, K) = conv_weight_CW.shape[0], state_NHVK.shape[1:]
    G = (C - H * V) // (2 * K)
    qkv_BC, z_BO, b_BH, a_BH = proj_BX.split([C, H * V, H, H], dim=-1)
    qkv_BC = conv1d_decode(qkv_BC, conv_state_NWC, slots_B, conv_weight_CW)
    q_BO, k_BO, v_BO = qkv_BC.split([G * K, G * K, H * V], dim=-1)
    # b (g k) -> b (g r) k
    q_BHK, k_BHK = (x.unflatten(-1, (G, K)).repeat_interleave(H // G, 1) for x in (q_BO, k_BO))
    g_BHK = decay(a_BH, A_log_H, dt_bias_H).unsqueeze(-1).expand(-1, -1, K)
    v_BHV, z_BHV = v_BO.unflatten(-1, (H, V)), z_BO.unflatten(-1, (H, V))  # b (h v) -> b h v
    o_BHV = kda_decode(q_BHK, k_BHK, v_BHV, g_BHK, b_BH.float().sigmoid(), state_NHVK, slots_B)
    return gated_rms_norm(o_BHV, z_BHV, norm_weight_V, eps, silu=True).flatten(1)  # b h v -> b (h v)


def mixer_prefill_by(
    conv: Callable[..., Tensor], rule: Callable[..., Tensor], norm: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """ "gdn_mixer_prefill" by implementations of its parts."""

    def gdn_mixer_prefill(
        proj_TX: Tensor,
        *,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        A_log_H: Tensor,
        dt_bias_H: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        boundaries: Boundaries = (),
    ) -> Tensor:
        C, (H, V, K) = conv_weight_CW.shape[0], state_NHVK.shape[1:]
        G = (C - H * V) // (2 * K)
        qkv_TC, z_TO, b_TH, a_TH = proj_TX.split([C, H * V, H, H], dim=-1)
        qkv_TC = conv(qkv_TC, conv_state_NWC, slots_B, offsets, conv_weight_CW, boundaries=boundaries)
        q_TO, k_TO, v_TO = qkv_TC.split([G * K, G * K, H * V], dim=-1)
        o_THV = rule(
            q_TO.unflatten(-1, (G, K)),  # t (g k) -> t g k
            k_TO.unflatten(-1, (G, K)),
            v_TO.unflatten(-1, (H, V)),  # t (h v) -> t h v
            a_TH,
            b_TH,
            A_log_H=A_log_H,
            dt_bias_H=dt_bias_H,
            state_NHVK=state_NHVK,
            slots_B=slots_B,
            offsets=offsets,
            boundaries=boundaries,
        )
        return norm(o_THV, z_TO.unflatten(-1, (H, V)), norm_weight_V, eps, silu=True).flatten(1)  # t h v -> t (h v)

    return gdn_mixer_prefill


gdn_mixer_prefill = mixer_prefill_by(conv1d_prefill, gdn_prefill, gated_rms_norm)
