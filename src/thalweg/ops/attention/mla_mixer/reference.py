"""Decode of latent attention in plain torch, as the sequence of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.attention.mla.reference import mla_decode_absorbed, mla_write
from thalweg.ops.attention.mla_rope.reference import turned
from thalweg.ops.norm.reference import rms_norm


def mla_mixer_decode(
    proj_BX: Tensor,
    *,
    kv_norm_weight_R: Tensor,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    block_rows_B: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    (H, K, R), P = w_uk_HKR.shape, blocks_MSC.shape[-1] - w_uk_HKR.shape[-1]
    q_BX, c_BR, shared_BP = proj_BX.split([H * (K + P), R, P], dim=-1)
    mla_write(torch.cat((rms_norm(c_BR, kv_norm_weight_R, eps), shared_BP), dim=-1), blocks_MSC, block_rows_B)
    return mla_decode_absorbed(
        q_BX.unflatten(-1, (H, K + P)),
        blocks_MSC,
        block_tables_BN=block_tables_BN,
        context_lens_B=context_lens_B,
        w_uk_HKR=w_uk_HKR,
        w_uv_HVR=w_uv_HVR,
        scale=scale,
    )


def mla_decode(
    q_BO: Tensor,
    *,
    positions_B: Tensor,
    frequencies_F: Tensor,
    rope_scale: float,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    scale: float,
) -> Tensor:
    (H, K, _), P = w_uk_HKR.shape, 2 * len(frequencies_F)
    q_BHK, q_BHP = q_BO.unflatten(-1, (H, K + P)).split([K, P], dim=-1)
    return mla_decode_absorbed(
        torch.cat((q_BHK, turned(q_BHP, positions_B, frequencies_F, rope_scale)), dim=-1),
        blocks_MSC,
        block_tables_BN=block_tables_BN,
        context_lens_B=context_lens_B,
        w_uk_HKR=w_uk_HKR,
        w_uv_HVR=w_uv_HVR,
        scale=scale,
    )
