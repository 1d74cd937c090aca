"""Multi-head latent attention over blocks in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Elements of the largest temporary: 64 MiB of fp32. Decode passes it for a single long sequence only.
MAX_ELEMENTS = 2**24


def mla_write(latent_TC: Tensor, blocks_MSC: Tensor, block_rows_T: Tensor) -> None:
    """Store latent_TC[t] in row block_rows_T[t] of the flattened blocks, in the blocks' dtype."""
    blocks_MSC.view(-1, blocks_MSC.shape[-1])[block_rows_T] = latent_TC.to(blocks_MSC.dtype)


def mla_decode(
    q_BHC: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    scale: float,
    rank: int,
) -> Tensor:
    """o_BHR: absorbed attention of one new token per sequence over its whole context.

    q_BHC is [q_nope @ w_uk (R), q_rope (P)]. context_lens_B (int32) counts the tokens in the blocks, the new one
    included; 0 gives zeros. Values are the first `rank` channels; the caller applies w_uv to the result.
    """
    B, (block_size, C) = len(context_lens_B), blocks_MSC.shape[1:]
    num_blocks = max(1, -(-max(context_lens_B.tolist(), default=0) // block_size))
    if B > 1 and B * num_blocks * block_size * C > MAX_ELEMENTS:
        halves = (slice(0, B // 2), slice(B // 2, B))
        args = [(q_BHC[h], blocks_MSC, block_tables_BN[h], context_lens_B[h], scale, rank) for h in halves]
        return torch.cat([mla_decode(*a) for a in args])
    latent_MSC = blocks_MSC.index_select(0, block_tables_BN[:, :num_blocks].flatten())
    latent_BSC = latent_MSC.view(B, num_blocks * block_size, C).float()
    beyond_BS = torch.arange(latent_BSC.shape[1], device=q_BHC.device) >= context_lens_B.unsqueeze(1)
    # Zeroed, not only masked in the softmax: a stale row may hold NaN, and 0 * NaN is NaN.
    latent_BSC.masked_fill_(beyond_BS.unsqueeze(-1), 0.0)
    scores_BHS = torch.bmm(q_BHC.float() * scale, latent_BSC.transpose(1, 2))
    # A finite fill, so that an empty context averages zeroed rows instead of giving NaN.
    scores_BHS.masked_fill_(beyond_BS.unsqueeze(1), torch.finfo(torch.float32).min)
    return torch.bmm(scores_BHS.softmax(-1), latent_BSC[..., :rank]).to(q_BHC.dtype)


def mla_decode_absorbed(
    q_BHX: Tensor,
    blocks_MSC: Tensor,
    *,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    scale: float,
) -> Tensor:
    K, R = w_uk_HKR.shape[1:]
    q_nope_BHK, q_shared_BHP = q_BHX.split([K, q_BHX.shape[-1] - K], dim=-1)
    q_latent_BHR = torch.bmm(q_nope_BHK.transpose(0, 1), w_uk_HKR).transpose(0, 1)
    q_BHC = torch.cat((q_latent_BHR, q_shared_BHP), dim=-1)
    o_BHR = mla_decode(q_BHC, blocks_MSC, block_tables_BN, context_lens_B, scale, R)
    return torch.bmm(o_BHR.transpose(0, 1), w_uv_HVR.transpose(1, 2)).transpose(0, 1).flatten(1)


def mla_prefill(
    q_THX: Tensor,
    blocks_MSC: Tensor,
    *,
    block_tables_BN: Tensor,
    context_lens: Sequence[int],
    offsets: Sequence[int],
    up_HXR: Tensor,
    value_dims: int,
    scale: float,
) -> Tensor:
    o_THV = q_THX.new_empty(*q_THX.shape[:2], value_dims)
    w_uk_HRK, w_uv_HRV = up_HXR.float().transpose(1, 2).split([up_HXR.shape[1] - value_dims, value_dims], dim=2)
    for b, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            q_HLX = q_THX[start:end].transpose(0, 1).float() * scale
            o_HLV = _attend(q_HLX, blocks_MSC, block_tables_BN[b], context_lens[b], w_uk_HRK, w_uv_HRV)
            o_THV[start:end] = o_HLV.transpose(0, 1)
    return o_THV


def _attend(
    q_HLX: Tensor, blocks_MSC: Tensor, block_table_N: Tensor, prefix: int, w_uk_HRK: Tensor, w_uv_HRV: Tensor
) -> Tensor:
    """o_HLV fp32 of one sequence, its keys and values expanded chunk by chunk with a running softmax."""
    (H, L, X), block_size, (R, V) = q_HLX.shape, blocks_MSC.shape[1], w_uv_HRV.shape[1:]
    total = prefix + L
    blocks_per_chunk = max(1, MAX_ELEMENTS // (H * max(L, X + V) * block_size))
    position_L1 = torch.arange(prefix, total, device=q_HLX.device).unsqueeze(1)
    max_HL1 = q_HLX.new_full((H, L, 1), -torch.inf)
    sum_HL1 = q_HLX.new_zeros(H, L, 1)
    o_HLV = q_HLX.new_zeros(H, L, V)
    for block in range(0, -(-total // block_size), blocks_per_chunk):
        first = block * block_size
        latent_MSC = blocks_MSC.index_select(0, block_table_N[block : block + blocks_per_chunk])
        latent_SC = latent_MSC.flatten(0, 1)[: total - first].float()
        S = latent_SC.shape[0]
        latent_SR, shared_SP = latent_SC[:, :R], latent_SC[:, R:]
        k_HSX = torch.cat((latent_SR @ w_uk_HRK, shared_SP.expand(H, -1, -1)), dim=-1)
        v_HSV = latent_SR @ w_uv_HRV
        # Queries before this chunk's first key see none of it; every other one sees that first key at least.
        seen = slice(max(0, first - prefix), L)
        scores_HLS = q_HLX[:, seen] @ k_HSX.transpose(1, 2)
        if first + S - 1 > prefix:
            future_LS = torch.arange(first, first + S, device=q_HLX.device) > position_L1[seen]
            scores_HLS.masked_fill_(future_LS, -torch.inf)
        new_max_HL1 = torch.maximum(max_HL1[:, seen], scores_HLS.amax(-1, keepdim=True))
        p_HLS = (scores_HLS - new_max_HL1).exp_()
        keep_HL1 = (max_HL1[:, seen] - new_max_HL1).exp_()
        sum_HL1[:, seen] = sum_HL1[:, seen] * keep_HL1 + p_HLS.sum(-1, keepdim=True)
        o_HLV[:, seen] = o_HLV[:, seen] * keep_HL1 + p_HLS @ v_HSV
        max_HL1[:, seen] = new_max_HL1
    return o_HLV / sum_HL1
