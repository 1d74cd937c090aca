"""Causal depthwise convolution with SiLU in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.host_tables import Boundaries


def conv1d_decode(x_BC: Tensor, state_NWC: Tensor, slots_B: Tensor, weight_CW: Tensor) -> Tensor:
    """y_BC for one new token x_BC of each sequence; the state of its slot moves on by one, in place."""
    window_BWC = torch.cat((state_NWC[slots_B], x_BC.unsqueeze(1)), dim=1)
    state_NWC[slots_B] = window_BWC[:, 1:].to(state_NWC.dtype)
    y_BC = (window_BWC.float() * weight_CW.float().t()).sum(1)
    return F.silu(y_BC).to(x_BC.dtype)


def conv1d_prefill(
    x_TC: Tensor,
    state_NWC: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    weight_CW: Tensor,
    *,
    boundaries: Boundaries = (),
) -> Tensor:
    W, lengths = state_NWC.shape[1], [end - start for start, end in pairwise(offsets)]
    if not lengths:
        return torch.empty_like(x_TC)
    # Each sequence's W remembered inputs go before its tokens: one long row, all windows in it W + 1 wide.
    before_BWC = state_NWC[slots_B]
    row_EC = torch.cat([part for b, x in enumerate(x_TC.split(lengths)) for part in (before_BWC[b], x)])
    taps_WC = weight_CW.float().t()
    y_EC = row_EC[W:].float() * taps_WC[W]
    for w in range(W):
        y_EC.addcmul_(row_EC[w : w - W].float(), taps_WC[w])
    # A window that straddles two sequences gave a row too: sequence b's own start at offsets[b] + b * W.
    y_TC = torch.cat([y_EC[offsets[b] + b * W :][:length] for b, length in enumerate(lengths)])
    # Its part of the long row ends at offsets[b + 1] + (b + 1) * W, and the last W rows are its new state.
    after_BWC = torch.stack([row_EC[end + b * W :][:W] for b, end in enumerate(offsets[1:])])
    state_NWC[slots_B] = after_BWC.to(state_NWC.dtype)
    for b, tokens, slot in boundaries:
        state_NWC[slot] = row_EC[offsets[b] + b * W + tokens :][:W]
    return F.silu(y_TC).to(x_TC.dtype)
