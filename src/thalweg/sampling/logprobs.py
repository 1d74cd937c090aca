"""Log-probabilities to report, taken from the logits before any sampling option touches them."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.core import TokenLogprobs


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, top: int) -> list[TokenLogprobs]:
    """For each row of float32 logits: the chosen token's log-probability and rank, and the `top` most likely."""
    logprobs_RV = torch.log_softmax(logits_RV.float(), -1)
    chosen_R = logprobs_RV.gather(-1, token_ids_R[:, None]).squeeze(-1)
    ranks_R = (logprobs_RV > chosen_R[:, None]).sum(-1) + 1
    top = min(top, logits_RV.shape[-1])
    values_RK, ids_RK = logprobs_RV.topk(top, -1)
    columns = (token_ids_R.tolist(), chosen_R.tolist(), ranks_R.tolist(), ids_RK.tolist(), values_RK.tolist())
    return [TokenLogprobs(*row) for row in zip(*columns, strict=True)]
