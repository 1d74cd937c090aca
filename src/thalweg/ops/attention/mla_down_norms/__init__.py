"""Op "split_norms": what follows the fused down-projection of an MLA layer with low-rank queries (Kimi-K2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.attention.mla_down_norms import reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitNormsDims:
    Q: int  # rank of the queries
    R: int  # rank of the latent


class SplitNorms(Protocol):
    def __call__(
        self, x_TX: Tensor, q_weight_Q: Tensor, kv_weight_R: Tensor, eps: float, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rms_norm(q)_TQ, rms_norm(latent)_TR, shared_TP) of x_TX = [q (Q) | latent (R) | shared key part (P)].

        x has a unit last stride. The norms are those of op "rms_norm": fp32, rounded once to x's dtype. The shared part
        is a view of x.
        """


SPLIT_NORMS: Op[SplitNormsDims, SplitNorms] = Op("split_norms", SplitNormsDims)


def _triton(where: Where, dims: SplitNormsDims) -> SplitNorms:
    from thalweg.ops.attention.mla_down_norms import triton

    return triton.split_norms


def _separate(where: Where, dims: SplitNormsDims) -> SplitNorms:
    from thalweg.ops.attention.mla_down_norms import triton

    return triton.split_norms_in_two_launches


def _triton_refuses(where: Where, dims: SplitNormsDims) -> Refusal:
    if not (1 <= dims.Q <= 16384 and 1 <= dims.R <= 16384):
        return f"needs parts of at most 16384, not {dims.Q} and {dims.R}"
    return why_not(where)


register(SPLIT_NORMS, "reference", lambda *_: reference.split_norms)
register(SPLIT_NORMS, "separate", _separate, supports=_triton_refuses, priority=-10)
register(SPLIT_NORMS, "triton", _triton, supports=_triton_refuses, priority=10)
