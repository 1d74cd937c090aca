"""Op "split_norms": what follows the fused down-projection of an MLA layer with low-rank queries (Kimi-K2)."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.attention.mla_down_norms import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain.triton_support import why_not


class SplitNorms(Protocol):
    def __call__(
        self, x_TX: Tensor, q_weight_Q: Tensor, kv_weight_R: Tensor, eps: float, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rms_norm(q)_TQ, rms_norm(latent)_TR, shared_TP) of x_TX = [q (Q) | latent (R) | shared key part (P)].

        x has a unit last stride. The norms are those of op "rms_norm": fp32, rounded once to x's dtype. The shared part
        is a view of x.
        """


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from thalweg.ops.attention.mla_down_norms.triton import split_norms

    return split_norms(*args)


def _triton_refuses(ctx: OpContext) -> str | None:
    Q, R = ctx.dims.get("Q", 0), ctx.dims.get("R", 0)
    if not (1 <= Q <= 16384 and 1 <= R <= 16384):
        return f"needs parts of at most 16384, not {Q} and {R}"
    return why_not(ctx)


_split_norms: SplitNorms = reference.split_norms
_kernel: SplitNorms = _triton
register("split_norms", "reference", _split_norms)
register("split_norms", "triton", _kernel, supports=_triton_refuses, priority=10)
