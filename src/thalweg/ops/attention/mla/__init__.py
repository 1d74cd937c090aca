"""Ops "mla_write", "mla_decode" and "mla_prefill": multi-head latent attention over a paged latent cache.

pages_MSC [pages, page size, C] holds one row per token: the latent of rank R, then P channels that all heads
share as keys only (the "rope" part, rotated or not before it gets here), C = R + P. block_tables_BN int32
[B, N] lists the pages of each sequence in order; entries past its end are any valid page. Rows beyond a
sequence's tokens are never used, whatever they hold (NaN included). Scores, softmax and sums are in fp32;
outputs have q's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.attention.mla import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain.triton_support import why_not


class MlaWrite(Protocol):
    def __call__(self, latent_TC: Tensor, pages_MSC: Tensor, page_rows_T: Tensor, /) -> None:
        """Store latent_TC[t] in row page_rows_T[t] of the flattened pages.

        Rows are int64, page * page size + place in the page. Values are converted to the pages' dtype.
        """


class MlaDecode(Protocol):
    def __call__(
        self,
        q_BHC: Tensor,
        pages_MSC: Tensor,
        block_tables_BN: Tensor,
        context_lens_B: Tensor,
        scale: float,
        rank: int,
        /,
    ) -> Tensor:
        """o_BHR: absorbed attention of one new token per sequence over its whole context.

        q_BHC is [q_nope @ w_uk (R), q_rope (P)]. context_lens_B (int32) counts the tokens in the
        pages, the new one included; 0 gives zeros. Values are the first `rank` channels; the caller applies w_uv to
        the result.
        """


class MlaPrefill(Protocol):
    def __call__(
        self,
        q_THX: Tensor,
        pages_MSC: Tensor,
        block_tables_BN: Tensor,
        context_lens: Sequence[int],
        offsets: Sequence[int],
        w_uk_HKR: Tensor,
        w_uv_HVR: Tensor,
        scale: float,
        /,
    ) -> Tensor:
        """o_THV: causal attention of each sequence's new tokens over its cached prefix and themselves.

        q_THX is [nope (K), rope (P)] per head. Sequence b owns tokens offsets[b]:offsets[b + 1] and has
        context_lens[b] tokens before them; the latents of all of them are in the pages already. Keys and
        values are expanded from the latents (k = [latent @ w_uk.T, shared part], v = latent @ w_uv.T), in
        blocks: working memory does not grow with the context.
        """


def _triton_prefill(*args: Any) -> Tensor:
    from thalweg.ops.attention.mla import triton

    return triton.mla_prefill(*args)


def _prefill_refuses(ctx: OpContext) -> str | None:
    dims = {name: ctx.dims.get(name, 0) for name in "KVP"}
    if any(n < 16 or n > 128 or n & (n - 1) for n in dims.values()):  # more do not fit into shared memory
        return f"needs K, V and P to be powers of two from 16 to 128, not {', '.join(map(str, dims.values()))}"
    return why_not(ctx) if ctx.dtype == "bfloat16" else f"needs bfloat16, not {ctx.dtype}"


_write: MlaWrite = reference.mla_write
_decode: MlaDecode = reference.mla_decode
_prefill: MlaPrefill = reference.mla_prefill
register("mla_write", "reference", _write)
register("mla_decode", "reference", _decode)
register("mla_prefill", "reference", _prefill)
register("mla_prefill", "triton", _triton_prefill, supports=_prefill_refuses, priority=10)
