"""Op "mla_mixer_decode": everything between the input and the output projection of an MLA layer, for one token.

From the fused input projection: RMSNorm of the latent, its write into the pages, the absorption of w_uk into the
queries, attention over the context, and w_uv. Package mla_attention describes the pages.

Implementations may read lengths, block tables and all rows of the pages but the new tokens' while the kernel ahead of
them in the stream still runs: as for op "kda_mixer_decode", an ordinary launch or the start of a graph must lie between
the call and whatever wrote these.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.attention.mla_mixer import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper


class MlaMixerDecode(Protocol):
    def __call__(
        self,
        proj_BX: Tensor,
        kv_norm_weight_R: Tensor,
        w_uk_HKR: Tensor,
        w_uv_HVR: Tensor,
        pages_MSC: Tensor,
        block_tables_BN: Tensor,
        context_lens_B: Tensor,
        page_rows_B: Tensor,
        scale: float,
        eps: float,
        /,
    ) -> Tensor:
        """o_BO in proj's dtype, O = H * V.

        proj_BX is [q (H * (K + P)), latent (R), shared key part (P)], raw; positions are not rotated. page_rows_B int64
        is the row of the flattened pages that each new token fills. context_lens_B int32 counts the new token.
        """


def _triton(*args: Any) -> Tensor:
    from thalweg.ops.attention.mla_mixer.triton import mla_mixer_decode

    return mla_mixer_decode(*args)


def _triton_refuses(ctx: OpContext) -> str | None:
    sizes = {name: ctx.dims.get(name, 0) for name in "KRPV"}
    if any(n < 16 or n & (n - 1) for n in sizes.values()):
        return f"needs powers of two of 16 or more, not {sizes}"
    if not 1 <= ctx.dims.get("H", 0) <= 32:
        return f"needs at most 32 heads on this rank, not {ctx.dims.get('H', 0)}"
    if sizes["R"] > 512 or sizes["P"] > 128 or sizes["K"] > 512:  # more do not fit into shared memory
        return f"needs R of at most 512, P of at most 128 and K of at most 512, not {sizes}"
    if ctx.dtype == "float32":
        return "needs bfloat16, not float32: two tiles of the cache must fit into shared memory"
    return why_not(ctx) or why_not_hopper()


_decode: MlaMixerDecode = reference.mla_mixer_decode
register("mla_mixer_decode", "reference", _decode, capturable=False)
register("mla_mixer_decode", "triton", _triton, supports=_triton_refuses, priority=10)
