"""Ops "gqa_mixer_decode", "gqa_prepare" and "gqa_prefill": gated attention of grouped heads over keys and values in
blocks.

keys_MSGK and values_MSGK [blocks, block size, G, K] hold one row per token. block_tables_BN int32 [B, N] lists the
blocks of each sequence in order; entries past its end are any valid block. Rows beyond a sequence's tokens are never
used, whatever they hold (NaN included). H query heads share G key heads, H / G neighbours each. Scores, softmax and
sums are in fp32; outputs have the projection's dtype.

A projection proj_TX is [q (K) | gate (K) for each of H heads | k (G * K) | v (G * K)], raw, with a unit last stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.attention import prompt_cuda
from thalweg.ops.attention.gqa import cpp, cuda, reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaDims:
    H: int  # query heads
    G: int  # key and value heads
    K: int  # dims of a head
    R: int  # of them, the first, rotated
    S: int  # tokens in a block


class GqaPrepare(Protocol):
    def __call__(
        self,
        proj_TX: Tensor,
        *,
        q_norm_weight_K: Tensor,
        k_norm_weight_K: Tensor,
        eps: float,
        frequencies_F: Tensor,
        rope_scale: float,
        positions_T: Tensor,
        keys_MSGK: Tensor,
        values_MSGK: Tensor,
        block_rows_T: Tensor,
    ) -> Tensor:
        """q_THK, contiguous: the queries, normed per head and rotated. Keys, normed and rotated likewise, and values
        are written into rows block_rows_T (int64, of the flattened blocks), in place.

        The norm is "rms_norm" over K with an fp32 or model-dtype weight. Rotation turns the pairs (i, i + R / 2) of the
        first R dims by position * frequencies_F[i] (fp32 [R / 2]); cosines and sines, in fp32, are multiplied with
        rope_scale. Nothing is rounded between norm and rotation. positions_T is int64.
        """


class GqaMixerDecode(Protocol):
    def __call__(
        self,
        proj_BX: Tensor,
        *,
        q_norm_weight_K: Tensor,
        k_norm_weight_K: Tensor,
        eps: float,
        frequencies_F: Tensor,
        rope_scale: float,
        positions_B: Tensor,
        keys_MSGK: Tensor,
        values_MSGK: Tensor,
        block_rows_B: Tensor,
        block_tables_BN: Tensor,
        context_lens_B: Tensor,
    ) -> Tensor:
        """o_BO, O = H * K, of one new token of each sequence: what "gqa_prepare" does, then softmax(q k / sqrt(K)) v
        over all of the sequence's tokens, times sigmoid of the query's gate.

        context_lens_B (int32) counts the tokens in the blocks, the new one included; at 0 the result is any finite
        value. Implementations may read positions, tables, lengths and the earlier tokens' rows while the kernel ahead
        of them in the stream still runs: what package kda_mixer says of slot numbers and states holds for those here.
        """


class GqaPrefill(Protocol):
    def __call__(
        self,
        q_THK: Tensor,
        proj_TX: Tensor,
        *,
        keys_MSGK: Tensor,
        values_MSGK: Tensor,
        block_tables_BN: Tensor,
        starts: Sequence[int],
        offsets: Sequence[int],
    ) -> Tensor:
        """o_TO of sequences of any length: sequence b owns tokens offsets[b]:offsets[b + 1], which follow starts[b]
        tokens that the blocks have already, and attends causally; the result is gated as in
        "gqa_mixer_decode"."""


GQA_MIXER_DECODE: Op[GqaDims, GqaMixerDecode] = Op("gqa_mixer_decode", GqaDims, rows="decodes")
GQA_PREPARE: Op[GqaDims, GqaPrepare] = Op("gqa_prepare", GqaDims, rows="prefills")
GQA_PREFILL: Op[GqaDims, GqaPrefill] = Op("gqa_prefill", GqaDims, rows="prefills")


def _triton_refuses(where: Where, dims: GqaDims) -> Refusal:
    if dims.K < 16 or dims.K > 256 or dims.K & (dims.K - 1):
        return f"needs heads whose dims are a power of two from 16 to 256, not {dims.K}"
    if dims.S & (dims.S - 1):
        return f"needs blocks of a power of two, not {dims.S}"
    return why_not(where)


def _triton_prepare(where: Where, dims: GqaDims) -> GqaPrepare:
    from thalweg.ops.attention.gqa import triton

    return triton.gqa_prepare


def _triton_mixer(where: Where, dims: GqaDims) -> GqaMixerDecode:
    from thalweg.ops.attention.gqa import triton

    return triton.gqa_mixer_decode


def _cuda_mixer_refuses(where: Where, dims: GqaDims) -> Refusal:
    if dims.H > 8 * dims.G or dims.R % 64:
        return (
            f"needs at most 8 heads to a key head and a multiple of 64 rotated dims, not {dims.H // dims.G}, {dims.R}"
        )
    return _cuda_refuses(where, dims)


def _library_prefill(where: Where, dims: GqaDims) -> GqaPrefill:
    from thalweg.ops.attention.gqa import library

    return library.gqa_prefill


def _library_refuses(where: Where, dims: GqaDims) -> Refusal:
    return None if where.device == "cuda" else f"torch's attention with a cached prefix is for cuda, not {where.device}"


def _cuda_refuses(where: Where, dims: GqaDims) -> Refusal:
    if dims.K != 256 or dims.S % 16:
        return f"needs heads of 256 dims and blocks of a multiple of 16 tokens, not {dims.K} and {dims.S}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return cuda_build.why_not(where) or why_not_hopper()


register(GQA_MIXER_DECODE, "reference", lambda *_: reference.gqa_mixer_decode, capturable=False)
register(GQA_MIXER_DECODE, "cpp", lambda *_: cpp.gqa_mixer_decode, supports=cpu_build.why_not, priority=10)
register(GQA_MIXER_DECODE, "triton", _triton_mixer, supports=_triton_refuses, priority=10)
register(GQA_MIXER_DECODE, "cuda", lambda *_: cuda.gqa_mixer_decode, supports=_cuda_mixer_refuses, priority=20)
register(GQA_PREPARE, "reference", lambda *_: reference.gqa_prepare, capturable=True)
register(GQA_PREPARE, "cpp", lambda *_: cpp.gqa_prepare, supports=cpu_build.why_not, priority=10)
register(GQA_PREPARE, "triton", _triton_prepare, supports=_triton_refuses, priority=10, capturable=True)
register(GQA_PREFILL, "reference", lambda *_: reference.gqa_prefill)
register(GQA_PREFILL, "cpp", lambda *_: cpp.gqa_prefill, supports=cpu_build.why_not, priority=10)
register(GQA_PREFILL, "library", _library_prefill, supports=_library_refuses, priority=10)
register(GQA_PREFILL, "cuda", lambda *_: prompt_cuda.gqa_prefill, supports=_cuda_refuses, priority=20, capturable=True)
