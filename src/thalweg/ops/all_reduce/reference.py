"""The sum over ranks in plain torch and the ranks' own collective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from thalweg.ops.residual.reference import scaled_residual_add

if TYPE_CHECKING:
    from thalweg.ops.all_reduce import Ranks
    from thalweg.ops.norm import NextNorm


def all_reduce_add(
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Tk: Tensor | None = None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
    next_norm: NextNorm | None = None,  # not computed
) -> Tensor:
    return residual_TD + ranks.all_reduce(of_rank(residual_TD, parts_PD, weights_Tk, own_TD, scale))


def of_rank(
    residual_TD: Tensor, parts_PD: Tensor, weights_Tk: Tensor | None, own_TD: Tensor | None, scale: float
) -> Tensor:
    """What this rank adds to the sum."""
    dtype = residual_TD.dtype
    if weights_Tk is not None:
        parts_TkD = parts_PD.view(*weights_Tk.shape, -1).float()
        parts_PD = (parts_TkD * weights_Tk.unsqueeze(-1)).sum(1)
    parts_PD = parts_PD.to(dtype)
    if own_TD is None:
        return parts_PD
    return scaled_residual_add(residual_TD.new_zeros(()), own_TD.to(dtype), parts_PD, scale)
