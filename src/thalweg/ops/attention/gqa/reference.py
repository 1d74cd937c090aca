"""Gated attention of grouped heads over blocks in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCORES = 2**24  # of a piece of queries: 64 MiB of fp32


def gqa_prepare(
    proj_TX: Tensor,
    *,
    q_norm_weight_K: Tensor,
    k_norm_weight_K: Tensor,
    eps: float,
    frequencies_F: Tensor,
    rope_scale: float,
    positions_T: Tensor,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_rows_T: Tensor,
) -> Tensor:
    G, K = keys_MSGK.shape[2:]
    q_THK, k_TGK, v_TGK = split_projection(proj_TX, G, K)
    angles_TF = positions_T.unsqueeze(1).float() * frequencies_F
    cos_T1F, sin_T1F = angles_TF.cos().unsqueeze(1) * rope_scale, angles_TF.sin().unsqueeze(1) * rope_scale

    def normed_and_rotated(x: Tensor, weight_K: Tensor) -> Tensor:
        x = F.rms_norm(x.float(), (K,), weight_K.float(), eps)
        half = len(frequencies_F)
        first, second, rest = x.split([half, half, K - 2 * half], dim=-1)
        return torch.cat((first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F, rest), dim=-1)

    keys_MSGK.view(-1, G, K)[block_rows_T] = normed_and_rotated(k_TGK, k_norm_weight_K).to(keys_MSGK.dtype)
    values_MSGK.view(-1, G, K)[block_rows_T] = v_TGK.to(values_MSGK.dtype)
    return normed_and_rotated(q_THK, q_norm_weight_K).to(proj_TX.dtype)


def gqa_decode(
    q_BHK: Tensor,
    proj_BX: Tensor,
    *,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
) -> Tensor:
    lens = context_lens_B.tolist()
    rows = [
        attend(q_BHK[b : b + 1], *context_of(keys_MSGK, values_MSGK, block_tables_BN[b], n), n - 1)
        for b, n in enumerate(max(1, n) for n in lens)
    ]
    o_BHK = torch.cat(rows) if rows else q_BHK
    return gated(o_BHK, proj_BX)


def mixer_by(prepare: Callable[..., Tensor], decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """ "gqa_mixer_decode" by implementations of its parts."""

    def gqa_mixer_decode(
        proj_BX: Tensor,
        *,
        q_norm_weight_K: Tensor,
        k_norm_weight_K: Tensor,
        eps: float,
        frequencies_F: Tensor,
        rope_scale: float,
        positions_B: Tensor,
        keys_MSGK: Tensor,
        values_MSGK: Tensor,
        block_rows_B: Tensor,
        block_tables_BN: Tensor,
        context_lens_B: Tensor,
    ) -> Tensor:
        q_BHK = prepare(
            proj_BX,
            q_norm_weight_K=q_norm_weight_K,
            k_norm_weight_K=k_norm_weight_K,
            eps=eps,
            frequencies_F=frequencies_F,
            rope_scale=rope_scale,
            positions_T=positions_B,
            keys_MSGK=keys_MSGK,
            values_MSGK=values_MSGK,
            block_rows_T=block_rows_B,
        )
        return decode(
            q_BHK,
            proj_BX,
            keys_MSGK=keys_MSGK,
            values_MSGK=values_MSGK,
            block_tables_BN=block_tables_BN,
            context_lens_B=context_lens_B,
        )

    return gqa_mixer_decode


gqa_mixer_decode = mixer_by(gqa_prepare, gqa_decode)


def gqa_prefill(
    q_THK: Tensor,
    proj_TX: Tensor,
    *,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_tables_BN: Tensor,
    starts: Sequence[int],
    offsets: Sequence[int],
) -> Tensor:
    o_THK = torch.empty_like(q_THK)
    for b, (first, last) in enumerate(pairwise(offsets)):
        if last > first:
            context = context_of(keys_MSGK, values_MSGK, block_tables_BN[b], starts[b] + last - first)
            o_THK[first:last] = attend(q_THK[first:last], *context, starts[b])
    return gated(o_THK, proj_TX)


def split_projection(proj_TX: Tensor, G: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """q_THK, k_TGK and v_TGK of a projection, without the gates."""
    X = proj_TX.shape[-1]
    qg_TX, k_TX, v_TX = proj_TX.split([X - 2 * G * K, G * K, G * K], dim=-1)
    q_THK = qg_TX.unflatten(-1, (-1, 2, K))[:, :, 0]  # t (h two k) -> t h k
    return q_THK, k_TX.unflatten(-1, (G, K)), v_TX.unflatten(-1, (G, K))  # t (g k) -> t g k


def gated(o_THK: Tensor, proj_TX: Tensor) -> Tensor:
    """o_TO, each head times the sigmoid of the gate beside its query, in fp32, rounded once."""
    H, K = o_THK.shape[1:]
    gate_THK = proj_TX[:, : 2 * H * K].unflatten(-1, (H, 2, K))[:, :, 1]  # t (h two k) -> t h k
    y_THK: Tensor = (o_THK.float() * gate_THK.float().sigmoid()).to(proj_TX.dtype)
    return y_THK.flatten(1)  # t h k -> t (h k)


def context_of(keys_MSGK: Tensor, values_MSGK: Tensor, block_table_N: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, G, K] of one sequence, in order."""
    blocks = block_table_N[: -(-tokens // keys_MSGK.shape[1])]
    return keys_MSGK[blocks].flatten(0, 1)[:tokens], values_MSGK[blocks].flatten(0, 1)[:tokens]


def attend(q_LHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, start: int) -> Tensor:
    """o_LHK in q's dtype: query i sees the keys up to start + i."""
    (L, H, K), (S, G) = q_LHK.shape, k_SGK.shape[:2]
    q_GRLK = q_LHK.float().mul(K**-0.5).transpose(0, 1).unflatten(0, (G, H // G))
    k_G1KS, v_G1SK = k_SGK.float().permute(1, 2, 0).unsqueeze(1), v_SGK.float().transpose(0, 1).unsqueeze(1)
    keys_S = torch.arange(S, device=q_LHK.device)
    piece, outputs = max(1, MAX_SCORES // (H * S)), []
    for i in range(0, L, piece):
        scores_GRLS = q_GRLK[:, :, i : i + piece] @ k_G1KS
        last_L1 = torch.arange(start + i, start + i + scores_GRLS.shape[2], device=q_LHK.device).unsqueeze(1)
        outputs.append(scores_GRLS.masked_fill_(keys_S > last_L1, -torch.inf).softmax(-1) @ v_G1SK)
    return torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1).to(q_LHK.dtype)
