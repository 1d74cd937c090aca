"""Gated attention of grouped heads: what stands ahead of attention in one launch, decode in two.

Decode splits a sequence's context over programs, as many as fill the device, each for all query heads of a key head; a
second launch joins the parts and applies the gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.attention.gqa.reference import mixer_by
from thalweg.ops.toolchain.triton_dot import dot
from thalweg.ops.toolchain.triton_support import multiprocessors

MAX_SPLITS = 64
JOIN_WARPS = 8  # of which each holds an eighth of up to 64 parts


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"])
def prepare_kernel(
    proj_ptr,  # [T, 2 * H * K + 2 * G * K]
    q_norm_ptr,
    k_norm_ptr,
    frequencies_ptr,  # fp32 [R / 2]
    positions_ptr,
    rows_ptr,
    q_ptr,  # [T, H, K]
    keys_ptr,  # [rows, G, K]
    values_ptr,
    proj_stride,
    eps,
    rope_scale,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a key head, filled up to a power of two
    HALF: tl.constexpr,  # pairs that are rotated
):
    """What a key head's query heads, its keys and its values need of a token, whose angles are the same for all."""
    token = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    ratio: tl.constexpr = H // G
    dims = tl.arange(0, K)
    heads = tl.arange(0, HEADS)
    row = tl.load(rows_ptr + token)
    proj_ptr += token * proj_stride
    v = tl.load(proj_ptr + (2 * H + G + g) * K + dims)
    tl.store(values_ptr + (row * G + g) * K + dims, v.to(values_ptr.dtype.element_ty))
    # The other dim of the pair.
    other = tl.where(dims < 2 * HALF, tl.where(dims < HALF, dims + HALF, dims - HALF), dims)
    pair = tl.where(dims < 2 * HALF, tl.where(dims < HALF, dims, dims - HALF), 0)
    angle = tl.load(positions_ptr + token).to(tl.float32) * tl.load(frequencies_ptr + pair)
    cos, sin = tl.cos(angle) * rope_scale, tl.sin(angle) * rope_scale
    inside = (heads < ratio)[:, None]
    starts = (2 * (g * ratio + heads) * K)[:, None]
    x = tl.load(proj_ptr + starts + dims[None, :], mask=inside, other=0.0)
    y = tl.load(proj_ptr + starts + other[None, :], mask=inside, other=0.0)
    q = normed_and_turned(x, y, q_norm_ptr, dims, other, cos, sin, eps, K, HALF)
    q_rows = ((token * H + g * ratio + heads) * K)[:, None]
    tl.store(q_ptr + q_rows + dims[None, :], q.to(q_ptr.dtype.element_ty), mask=inside)
    start = proj_ptr + (2 * H + g) * K
    x, y = tl.load(start + dims)[None, :], tl.load(start + other)[None, :]
    k = normed_and_turned(x, y, k_norm_ptr, dims, other, cos, sin, eps, K, HALF)
    tl.store(keys_ptr + (row * G + g) * K + dims[None, :], k.to(keys_ptr.dtype.element_ty))


@triton.jit
def normed_and_turned(x, y, w_ptr, dims, other, cos, sin, eps, K: tl.constexpr, HALF: tl.constexpr):
    """x [N, K], with y the other dims of its pairs."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    inverse = (1.0 / tl.sqrt(tl.sum(x * x, 1) / K + eps))[:, None]
    x = x * inverse * tl.load(w_ptr + dims).to(tl.float32)[None, :]
    y = y * inverse * tl.load(w_ptr + other).to(tl.float32)[None, :]
    turned = x * cos[None, :] + tl.where((dims < HALF)[None, :], -y, y) * sin[None, :]
    return tl.where((dims < 2 * HALF)[None, :], turned, x)


def gqa_prepare(
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
    (T, X), (G, K) = proj_TX.shape, keys_MSGK.shape[2:]
    H = (X - 2 * G * K) // (2 * K)
    q_THK = torch.empty(T, H, K, dtype=proj_TX.dtype, device=proj_TX.device)
    if T:
        prepare_kernel[(T, G)](
            proj_TX,
            q_norm_weight_K,
            k_norm_weight_K,
            frequencies_F,
            positions_T,
            block_rows_T,
            q_THK,
            keys_MSGK,
            values_MSGK,
            proj_TX.stride(0),
            eps,
            rope_scale,
            H=H,
            G=G,
            K=K,
            HALF=len(frequencies_F),
            **prepare_options(H // G, K),
        )
    return q_THK


def prepare_options(ratio: int, K: int) -> dict[str, int]:
    heads = triton.next_power_of_2(ratio)
    return {"HEADS": heads, "num_warps": max(1, min(4, heads * K // 1024))}


@triton.jit(do_not_specialize=["splits", "table_stride"], do_not_specialize_on_alignment=["tables_ptr", "lens_ptr"])
def attend_kernel(
    q_ptr,  # [B, H, K]
    keys_ptr,  # [blocks, S, G, K]
    values_ptr,
    tables_ptr,  # [B, N]
    lens_ptr,
    parts_ptr,  # fp32 [B, H, splits, K]: sums of values, weighted by exp(score - the largest one)
    sums_ptr,  # fp32 [B, H, splits, 2]: that largest score, and the weights' sum
    table_stride,
    splits,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a key head, filled up to what a product needs
    TILE: tl.constexpr,  # tokens
):
    b = tl.program_id(0)
    g = tl.program_id(1)
    split = tl.program_id(2)
    ratio: tl.constexpr = H // G
    n = tl.load(lens_ptr + b)
    tiles = (n + TILE - 1) // TILE
    each = (tiles + splits - 1) // splits
    first = split * each
    last = tl.minimum(first + each, tiles)
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, K)
    inside = heads < ratio
    q_rows = (b * H + g * ratio + heads) * K
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
    best = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, K], tl.float32)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        here = tokens < n
        block = tl.load(tables_ptr + b * table_stride + tokens // S, mask=here, other=0).to(tl.int64)
        rows = ((block * S + tokens % S) * G + g) * K
        k = tl.load(keys_ptr + rows[None, :] + dims[:, None], mask=here[None, :], other=0.0)
        scores = dot(q, k.to(q.dtype)) * scale
        scores = tl.where(here[None, :], scores, -float("inf"))
        largest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - largest[:, None])
        kept = tl.exp(best - largest)
        v = tl.load(values_ptr + rows[:, None] + dims[None, :], mask=here[:, None], other=0.0)
        acc = acc * kept[:, None] + dot(weights.to(v.dtype), v)
        total = total * kept + tl.sum(weights, 1)
        best = largest
    part = (b * H + g * ratio + heads) * splits + split
    tl.store(parts_ptr + part[:, None] * K + dims[None, :], acc, mask=inside[:, None])
    tl.store(sums_ptr + part * 2, best, mask=inside)
    tl.store(sums_ptr + part * 2 + 1, total, mask=inside)


@triton.jit
def join_kernel(
    parts_ptr,
    sums_ptr,
    proj_ptr,
    o_ptr,  # [B, H * K]
    proj_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, K)
    part = (b * H + head) * SPLITS + tl.arange(0, SPLITS)
    best = tl.load(sums_ptr + part * 2)
    total = tl.load(sums_ptr + part * 2 + 1)
    largest = tl.max(best, 0)
    # Parts without a token have -inf and no weight; a sequence without tokens has only such parts.
    weights = tl.where(best > -float("inf"), tl.exp(best - largest), 0.0)
    parts = tl.load(parts_ptr + part[:, None] * K + dims[None, :])
    o = tl.sum(parts * weights[:, None], 0) / tl.maximum(tl.sum(weights * total, 0), 1e-30)
    gate = tl.load(proj_ptr + b * proj_stride + (2 * head + 1) * K + dims).to(tl.float32)
    o = o / (1.0 + tl.exp(-gate))
    tl.store(o_ptr + (b * H + head) * K + dims, o.to(o_ptr.dtype.element_ty))


def splits_for(B: int, G: int, processors: int) -> int:
    """Parts of a context: as many as give each multiprocessor up to two programs, in powers of two, of which the sizes
    of graphs meet all, so that no other batch compiles a kernel later."""
    most = max(1, min(MAX_SPLITS, 2 * processors // (B * G)))
    return 1 << (most.bit_length() - 1)


def attend_options(H: int, G: int, dtype: torch.dtype) -> dict[str, int]:
    """Of "attend": query heads, at least as many as a product takes, and tokens; products in fp32 want more threads to
    hold them."""
    heads = max(16, triton.next_power_of_2(H // G))
    tile, warps = (32, 8) if dtype == torch.float32 else (64, 4)
    return {"HEADS": heads, "TILE": tile, "num_warps": warps, "num_stages": 2}


def gqa_decode(
    q_BHK: Tensor,
    proj_BX: Tensor,
    *,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
) -> Tensor:
    (B, H, K), (S, G) = q_BHK.shape, keys_MSGK.shape[1:3]
    o_BO = torch.empty(B, H * K, dtype=proj_BX.dtype, device=q_BHK.device)
    if B == 0:
        return o_BO
    splits = splits_for(B, G, multiprocessors(q_BHK.device))
    parts = torch.empty(B, H, splits, K, dtype=torch.float32, device=q_BHK.device)
    sums = torch.empty(B, H, splits, 2, dtype=torch.float32, device=q_BHK.device)
    attend_kernel[(B, G, splits)](
        q_BHK,
        keys_MSGK,
        values_MSGK,
        block_tables_BN,
        context_lens_B,
        parts,
        sums,
        block_tables_BN.stride(0),
        splits,
        K**-0.5,
        H=H,
        G=G,
        K=K,
        S=S,
        **attend_options(H, G, q_BHK.dtype),
    )
    join_kernel[(B, H)](
        parts,
        sums,
        proj_BX,
        o_BO,
        proj_BX.stride(0),
        H=H,
        K=K,
        SPLITS=splits,
        num_warps=JOIN_WARPS,
    )
    return o_BO


gqa_mixer_decode = mixer_by(gqa_prepare, gqa_decode)
