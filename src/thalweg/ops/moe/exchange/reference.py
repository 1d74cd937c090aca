"""The exchange in plain torch and the ranks' own collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from thalweg.ops.moe.exchange import Gathered, Ranks


def dispatch(
    live_R: Tensor, x_TD: Tensor, weights_Tk: Tensor, slots_Tk: Tensor, ranks: Ranks, *, here: int, shared: int
) -> Gathered:
    from thalweg.ops.moe.exchange import Gathered

    (T, k), R, K = slots_Tk.shape, len(live_R), slots_Tk.shape[1] - shared
    first = ranks.rank * here
    slots_Tk = torch.where(live_R[:T].unsqueeze(1) != 0, slots_Tk, -1)
    routing = torch.cat([slots_Tk.to(torch.int32), weights_Tk.contiguous().view(torch.int32)], 1)
    x_AD = ranks.gather(F.pad(x_TD, (0, 0, 0, R - T)))
    routing_A2k = ranks.gather(F.pad(routing, (0, 0, 0, R - T), value=-1))
    slots_Ak, weights_Ak = routing_A2k[:, :k].long(), routing_A2k[:, k:].contiguous().view(torch.float32)
    ids_Ak = slots_Ak - first
    ours_Ak = (slots_Ak >= first) & (ids_Ak < here)
    own_A = torch.arange(len(ids_Ak), device=ids_Ak.device) // R == ranks.rank
    ours_Ak[:, K:] = own_A.unsqueeze(1) & (slots_Ak[:, K:] >= 0)
    ids_Ak[:, K:] = torch.arange(here, here + shared, device=ids_Ak.device)
    return Gathered(x_AD, torch.where(ours_Ak, weights_Ak, 0.0), torch.where(ours_Ak, ids_Ak, -1))


def combine(
    live_R: Tensor,
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Ak: Tensor | None = None,
    own_TD: Tensor | None = None,
) -> Tensor:
    T, R = len(residual_TD), len(live_R)
    if weights_Ak is not None:
        weights_Ak1 = weights_Ak.unsqueeze(-1)
        parts_AkD = parts_PD.view(*weights_Ak.shape, -1).float()
        parts_PD = torch.where(weights_Ak1 != 0, parts_AkD * weights_Ak1, 0.0).sum(1)
    each = [R] * ranks.size
    parts_AD = ranks.all_to_all(parts_PD.to(residual_TD.dtype), each, each)
    sum_TD = residual_TD + parts_AD.view(ranks.size, R, -1)[:, :T].float().sum(0)
    return (sum_TD if own_TD is None else sum_TD + own_TD).to(residual_TD.dtype)
