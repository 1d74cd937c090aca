"""Routing in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.errors import ConfigError
from thalweg.ops.norm.reference import rms_norm


def is_softmax(scoring: str) -> bool:
    """Whether scores are softmax, not sigmoid. Raises ConfigError on an unknown `scoring`."""
    if scoring not in ("sigmoid", "softmax"):
        raise ConfigError(f"router scoring is {scoring!r}; expected 'sigmoid' or 'softmax'")
    return scoring == "softmax"


def empty_results(x_TD: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """What "norm_router" fills in and returns, uninitialised: normed [T, D] in x's dtype, weights fp32 and ids int64,
    both [T, slots]."""
    T, D = x_TD.shape
    weights_Tk = torch.empty(T, slots, dtype=torch.float32, device=x_TD.device)
    ids_Tk = torch.empty(T, slots, dtype=torch.int64, device=x_TD.device)
    return torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device), weights_Tk, ids_Tk


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    renormalize: bool,
    scale: float,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
) -> tuple[Tensor, Tensor]:
    """(weights_Tk fp32, ids_Tk int64): the top_k experts of each token and what their outputs count.

    Scores are sigmoid or softmax of fp32 logits_TE. The experts are those with the largest score +
    bias_E; the bias serves this choice only, a weight is the unbiased score. renormalize divides the
    weights of a token by their sum + 1e-20; `scale` multiplies them last. With n_group > 1 the experts
    form n_group equal groups in order, and only the topk_group groups with the largest sum of their two
    best biased scores compete (DeepSeek-V3). Experts come best first. Raises ConfigError on an unknown
    `scoring`.
    """
    scores_TE = logits_TE.float().softmax(-1) if is_softmax(scoring) else logits_TE.float().sigmoid()
    choice_TE = scores_TE + bias_E.float()
    if n_group > 1:
        groups_TGE = choice_TE.unflatten(-1, (n_group, -1))
        group_scores_TG = groups_TGE.topk(min(2, groups_TGE.shape[-1]), dim=-1).values.sum(-1)
        kept = group_scores_TG.topk(topk_group, dim=-1).indices
        dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept, False)
        choice_TE = groups_TGE.masked_fill(dropped_TG.unsqueeze(-1), -torch.inf).flatten(1)
    ids_Tk = choice_TE.topk(top_k, dim=-1).indices
    weights_Tk = scores_TE.gather(1, ids_Tk)
    if renormalize:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    return weights_Tk * scale, ids_Tk


def norm_router(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    w_ED: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    scale: float,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    num_shared: int = 0,
    known_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    normed_TD = rms_norm(x_TD, norm_weight_D, eps) if known_TD is None else known_TD
    E = len(bias_E)
    logits_TE, gates_TG = F.linear(normed_TD.float(), w_ED.float()).tensor_split([E], dim=-1)
    weights_Tk, ids_Tk = route(logits_TE, bias_E, top_k, renormalize, scale, scoring, n_group, topk_group)
    if num_shared:
        shared_TS = torch.arange(E, E + num_shared, device=ids_Tk.device).expand(len(ids_Tk), -1)
        gates_TG = gates_TG.sigmoid() if gates_TG.shape[1] else torch.ones_like(weights_Tk[:, :1])
        weights_Tk = torch.cat((weights_Tk, gates_TG.expand(-1, num_shared)), dim=1)
        ids_Tk = torch.cat((ids_Tk, shared_TS), dim=1)
    return normed_TD, weights_Tk, ids_Tk
