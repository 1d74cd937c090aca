"""Op "split_norms": all that lies between the down-projection of a layer with latent attention, the projection of its
queries, if they are of low rank, and the cache. With rotated positions (Kimi-K2) or without (Kimi-Linear).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.attention.mla_down_norms import cpp, reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitNormsDims:
    Q: int  # rank of the queries; 0: they are not of low rank, and not here
    R: int  # rank of the latent
    P: int  # shared key part
    rotated: bool = True


class SplitNorms(Protocol):
    def __call__(
        self,
        x_TX: Tensor,
        q_weight_Q: Tensor | None,
        kv_weight_R: Tensor,
        eps: float,
        /,
        *,
        positions_T: Tensor,
        frequencies_F: Tensor,
        rope_scale: float,
        blocks_MSC: Tensor,
        block_rows_T: Tensor,
    ) -> Tensor:
        """rms_norm(q)_TQ of x_TX = [q (Q) | latent (R) | shared key part (P)], which has a unit last stride. The normed
        latent and the rotated shared part are in row block_rows_T[t] of the flattened blocks afterwards. Without
        frequencies (F = 0) the shared part stays as it is.

        The norms are those of op "rms_norm": fp32, rounded once to x's dtype. The rotation is that of op "mla_rope".
        blocks_MSC [blocks, block size, R + P] are contiguous and of x's dtype; block_rows_T and positions_T are int64.
        Without a weight for q, Q is 0. Implementations may read positions and block rows while the kernel ahead of them
        still runs, as op "mla_mixer_decode" may.
        """


SPLIT_NORMS: Op[SplitNormsDims, SplitNorms] = Op("split_norms", SplitNormsDims)


def _triton(where: Where, dims: SplitNormsDims) -> SplitNorms:
    from thalweg.ops.attention.mla_down_norms import triton

    return triton.split_norms


def _separate(where: Where, dims: SplitNormsDims) -> SplitNorms:
    from thalweg.ops.attention.mla_down_norms import triton

    return triton.split_norms_by_parts


def _triton_refuses(where: Where, dims: SplitNormsDims) -> Refusal:
    if not (0 <= dims.Q <= 16384 and 1 <= dims.R <= 16384 and 1 <= dims.P <= 16384):
        return f"needs parts of at most 16384, not {dims.Q}, {dims.R} and {dims.P}"
    return why_not(where)


register(SPLIT_NORMS, "reference", lambda *_: reference.split_norms)
register(SPLIT_NORMS, "cpp", lambda *_: cpp.split_norms, supports=cpu_build.why_not, priority=10)
register(SPLIT_NORMS, "separate", _separate, supports=_triton_refuses, priority=-10)
register(SPLIT_NORMS, "triton", _triton, supports=_triton_refuses, priority=10)
