"""Prefill by torch's scaled dot product attention: each sequence's context gathered from its blocks first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from thalweg.ops.attention.gqa.reference import context_of, gated


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
    o_THK, ratio = torch.empty_like(q_THK), q_THK.shape[1] // keys_MSGK.shape[2]
    for b, (first, last) in enumerate(pairwise(offsets)):
        if last == first:
            continue
        k_SGK, v_SGK = context_of(keys_MSGK, values_MSGK, block_tables_BN[b], starts[b] + last - first)
        q, k, v = (
            x.transpose(0, 1).unsqueeze(0)
            for x in (q_THK[first:last], k_SGK.repeat_interleave(ratio, 1), v_SGK.repeat_interleave(ratio, 1))
        )
        # The last query sees every key: with a cached prefix the mask's diagonal ends in the lower right corner.
        mask = causal_lower_right(q.shape[2], k.shape[2])
        o_THK[first:last] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
    return gated(o_THK, proj_TX)
