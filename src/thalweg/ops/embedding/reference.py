"""Rows of the vocabulary in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from thalweg.ops.all_reduce import Ranks
    from thalweg.quant import Scheme


def embedding(ids_T: Tensor, w_VD: Tensor, ranks: Ranks) -> Tensor:
    """A rank gives zeros for ids that it does not hold, then all sum up."""
    local_T = ids_T - ranks.tp_rank * len(w_VD)
    here_T = (local_T >= 0) & (local_T < len(w_VD))
    x_TD = F.embedding(torch.where(here_T, local_T, 0), w_VD)
    return ranks.all_reduce(torch.where(here_T[:, None], x_TD, 0))


def vocab_rows(ids_T: Tensor, w: Tensor, *, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    return scheme.rows_of([w], ids_T, dtype)
