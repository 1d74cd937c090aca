"""Log-probabilities to report, taken from the logits before any sampling option touches them."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.core import TokenLogprobs

ROWS = 512  # at a time: the prompt of a step may have thousands, and a row over a large vocabulary takes a megabyte


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, top: int) -> list[TokenLogprobs]:
    """For each row of logits, in float32: the chosen token's log-probability and rank, and the `top` most likely."""
    parts = zip(logits_RV.split(ROWS), token_ids_R.split(ROWS), strict=True)
    return [entry for logits, token_ids in parts for entry in _of_rows(logits, token_ids, top)]


def _of_rows(logits_RV: Tensor, token_ids_R: Tensor, top: int) -> list[TokenLogprobs]:
    logprobs_RV = torch.log_softmax(logits_RV.float(), -1)
    chosen_R = logprobs_RV.gather(-1, token_ids_R[:, None]).squeeze(-1)
    ranks_R = (logprobs_RV > chosen_R[:, None]).sum(-1) + 1
    top = min(top, logits_RV.shape[-1])
    values_RK, ids_RK = logprobs_RV.topk(top, -1)
    columns = (token_ids_R.tolist(), chosen_R.tolist(), ranks_R.tolist(), ids_RK.tolist(), values_RK.tolist())
    return [TokenLogprobs(*row) for row in zip(*columns, strict=True)]
