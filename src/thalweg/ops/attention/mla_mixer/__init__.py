"""Ops "mla_mixer_decode" and "mla_decode": attention of one new token of each sequence, absorbed, up to the output
projection. Package attention/mla describes the blocks.

"mla_mixer_decode" is everything from the fused input projection on, where nothing is rotated: RMSNorm of the latent,
its write into the blocks, the absorption of w_uk into the queries, attention over the context, and w_uv. "mla_decode"
begins with queries from a projection of their own, which it rotates; latents are in the blocks already.

Implementations may read lengths, block tables and all rows of the blocks but the new tokens' while the kernel ahead of
them in the stream still runs: as for op "kda_mixer_decode", an ordinary launch or the start of a graph must lie between
the call and whatever wrote these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.attention.mla_mixer import cpp, reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaMixerDims:
    H: int
    K: int  # of a head's key, without the shared part
    V: int
    R: int  # rank of the latent
    P: int  # shared key part
    S: int  # tokens in a block


class MlaMixerDecode(Protocol):
    def __call__(
        self,
        proj_BX: Tensor,
        *,
        kv_norm_weight_R: Tensor,
        w_uk_HKR: Tensor,
        w_uv_HVR: Tensor,
        blocks_MSC: Tensor,
        block_tables_BN: Tensor,
        context_lens_B: Tensor,
        block_rows_B: Tensor,
        scale: float,
        eps: float,
    ) -> Tensor:
        """o_BO in proj's dtype, O = H * V.

        proj_BX is [q (H * (K + P)), latent (R), shared key part (P)], raw, with a unit last stride; positions are not
        rotated. block_rows_B int64 is the row of the flattened blocks that each new token fills. context_lens_B int32
        counts the new token. Block tables have a unit last stride; a head of the weights is contiguous.
        """


class MlaDecode(Protocol):
    def __call__(
        self,
        q_BO: Tensor,
        *,
        positions_B: Tensor,
        frequencies_F: Tensor,
        rope_scale: float,
        w_uk_HKR: Tensor,
        w_uv_HVR: Tensor,
        blocks_MSC: Tensor,
        block_tables_BN: Tensor,
        context_lens_B: Tensor,
        scale: float,
    ) -> Tensor:
        """o_BO in q's dtype, O = H * V, of q_BO, O = H * (K + P), raw, with a unit last stride; the last P of a head's
        queries are rotated as op "mla_rope" says. context_lens_B int32 counts the new token, whose latent is in the
        blocks. Block tables have a unit last stride; a head of the weights is contiguous.
        """


MLA_MIXER_DECODE: Op[MlaMixerDims, MlaMixerDecode] = Op("mla_mixer_decode", MlaMixerDims, rows="decodes")
MLA_DECODE: Op[MlaMixerDims, MlaDecode] = Op("mla_decode", MlaMixerDims, rows="decodes")

TILE = 64  # tokens of the context in a tile of the kernels in Gluon


def _triton(where: Where, dims: MlaMixerDims) -> MlaMixerDecode:
    from thalweg.ops.attention.mla_mixer.triton import mixer

    return mixer.mla_mixer_decode


def _gluon(where: Where, dims: MlaMixerDims) -> MlaMixerDecode:
    from thalweg.ops.attention.mla_mixer.triton import gluon

    return gluon.mla_mixer_decode


def _triton_decode(where: Where, dims: MlaMixerDims) -> MlaDecode:
    from thalweg.ops.attention.mla_mixer.triton import mixer

    return mixer.mla_decode


def _gluon_decode(where: Where, dims: MlaMixerDims) -> MlaDecode:
    from thalweg.ops.attention.mla_mixer.triton import gluon

    return gluon.mla_decode


def _triton_refuses(where: Where, dims: MlaMixerDims) -> Refusal:
    sizes = {name: getattr(dims, name) for name in "KRPV"}
    if any(n < 16 or n & (n - 1) for n in sizes.values()):
        return f"needs powers of two of 16 or more, not {sizes}"
    if dims.R > 512 or dims.P > 128 or dims.K > 512:  # more do not fit into shared memory
        return f"needs R of at most 512, P of at most 128 and K of at most 512, not {sizes}"
    if where.dtype == "float32":
        return "needs bfloat16, not float32: two tiles of the cache must fit into shared memory"
    return why_not(where) or why_not_hopper()


def _gluon_refuses(where: Where, dims: MlaMixerDims) -> Refusal:
    if dims.S % TILE:
        return f"needs blocks of a multiple of {TILE} tokens, not {dims.S}"
    if dims.R % 128 or dims.P > 64 or dims.V % 64:
        sizes = f"{dims.R}, {dims.P} and {dims.V}"
        return f"needs R to be a multiple of 128, P of at most 64 and V to be a multiple of 64, not {sizes}"
    return _triton_refuses(where, dims) or _why_not_gluon()


def _why_not_gluon() -> Refusal:
    try:
        from thalweg.ops.attention.mla_mixer.triton import gluon  # noqa: F401
    except ImportError as e:  # Gluon is experimental: in another Triton it may be elsewhere
        return f"needs the Gluon of another Triton: {e}"
    return None


register(MLA_MIXER_DECODE, "reference", lambda *_: reference.mla_mixer_decode, capturable=False)
register(MLA_MIXER_DECODE, "cpp", lambda *_: cpp.mla_mixer_decode, supports=cpu_build.why_not, priority=10)
register(MLA_MIXER_DECODE, "triton", _triton, supports=_triton_refuses, priority=10)
register(MLA_MIXER_DECODE, "gluon", _gluon, supports=_gluon_refuses, priority=20)
register(MLA_DECODE, "reference", lambda *_: reference.mla_decode, capturable=False)
register(MLA_DECODE, "cpp", lambda *_: cpp.mla_decode, supports=cpu_build.why_not, priority=10)
register(MLA_DECODE, "triton", _triton_decode, supports=_triton_refuses, priority=10)
register(MLA_DECODE, "gluon", _gluon_decode, supports=_gluon_refuses, priority=20)
