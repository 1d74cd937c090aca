"""Op "mla_prefill": multi-head latent attention over a paged latent cache. Package attention/mla_mixer has what decode
rows do, and attention/mla_down_norms what comes before.

blocks_MSC [blocks, block size, C] holds one row per token: the latent of rank R, then P channels that all heads
share as keys only (the "rope" part, rotated or not before it gets here), C = R + P. block_tables_BN int32
[B, N] lists the blocks of each sequence in order; entries past its end are any valid block. Rows beyond a
sequence's tokens are never used, whatever they hold (NaN included). Scores, softmax and sums are in fp32;
outputs have q's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.attention.mla import cpp, cuda, reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaPrefillDims:
    H: int
    K: int  # of a head's key, without the shared part
    V: int
    R: int  # rank of the latent
    P: int  # shared key part


class MlaPrefill(Protocol):
    def __call__(
        self,
        q_THX: Tensor,
        blocks_MSC: Tensor,
        *,
        block_tables_BN: Tensor,
        context_lens: Sequence[int],
        offsets: Sequence[int],
        up_HXR: Tensor,
        value_dims: int,
        scale: float,
    ) -> Tensor:
        """o_THV: causal attention of each sequence's new tokens over its cached prefix and themselves.

        q_THX is [nope (K), rope (P)] per head and may have any strides. Sequence b owns tokens
        offsets[b]:offsets[b + 1] and has context_lens[b] tokens before them; the latents of all of them are in the
        blocks already. up_HXR, contiguous, makes keys and values of the latents: of each head's rows the last
        `value_dims` the values (V), those before them the keys (K) without their shared part. They are made in chunks:
        working memory does not grow with the context.
        """


MLA_PREFILL: Op[MlaPrefillDims, MlaPrefill] = Op("mla_prefill", MlaPrefillDims, rows="prefills")


def _triton_prefill(where: Where, dims: MlaPrefillDims) -> MlaPrefill:
    from thalweg.ops.attention.mla.triton.prefill import mla_prefill

    return mla_prefill


def _prefill_refuses(where: Where, dims: MlaPrefillDims) -> Refusal:
    sizes = (dims.K, dims.V, dims.P)
    if any(n < 16 or n > 128 or n & (n - 1) for n in sizes):  # more do not fit into shared memory
        return f"needs K, V and P to be powers of two from 16 to 128, not {', '.join(map(str, sizes))}"
    return why_not(where) if where.dtype == "bfloat16" else f"needs bfloat16, not {where.dtype}"


def _cuda_refuses(where: Where, dims: MlaPrefillDims) -> Refusal:
    if (dims.K, dims.V, dims.P) != (128, 128, 64) or dims.R % 8:
        sizes = ", ".join(map(str, (dims.K, dims.V, dims.P, dims.R)))
        return f"needs K = V = 128, P = 64 and a multiple of 8 for R, not {sizes}"
    return _prefill_refuses(where, dims) or cuda_build.why_not(where) or why_not_hopper()


register(MLA_PREFILL, "reference", lambda *_: reference.mla_prefill)
register(MLA_PREFILL, "cpp", lambda *_: cpp.mla_prefill, supports=cpu_build.why_not, priority=10)
register(MLA_PREFILL, "triton", _triton_prefill, supports=_prefill_refuses, priority=10, capturable=True)
register(MLA_PREFILL, "cuda", lambda *_: cuda.mla_prefill, supports=_cuda_refuses, priority=20, capturable=True)
