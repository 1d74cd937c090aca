"""Launches the decode mixer of gated attention in CUDA C++ (decode.cu says how it works)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.toolchain.counters import counters
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("decode.cu")
K, THREADS, WARPS, PITCH, TILE_BYTES = 256, 128, 4, 528, 16896  # as in the source
FORMS = [(1, 1), (1, 2), (2, 1), (2, 2), (8, 1), (16, 1)]
"""(Blocks that share a context, a cluster; tiles of a warp's ring). One tile leaves room for two blocks on a
multiprocessor, two for one, which is then as fast."""
# Clusters of so many blocks that run at once on 132 multiprocessors, two blocks to each.
AT_ONCE = {16: 14, 8: 30, 2: 132}
MOST_PARTS = 7  # of a context, in clusters of 16
COUNTERS = 1024  # at least one for each block that runs at once
LOG2_E = 1.4426950408889634


def shared_bytes(stages: int) -> int:
    return WARPS * stages * TILE_BYTES + 8 * K * 4 + 10 * PITCH


def form_for(groups: int, processors: int) -> tuple[int, int, int]:
    """Of so many contexts: a form, and how many clusters may have parts of one. Few contexts get as many blocks as run
    at once, two to a multiprocessor; others as many as there are multiprocessors, or as contexts, if those are more.

    Clusters of 16 and 8 are the fastest way to share a short context, and fit less often the larger they are.
    """

    def parts(splits: int) -> int:
        return AT_ONCE[splits] * processors // 132 // groups

    if parts(16) > 1:
        return 16, 1, min(parts(16), MOST_PARTS)
    if 8 * groups <= processors:
        return 8, 1, max(parts(8), 1)
    if 4 * groups <= processors:
        return 2, 1, parts(2)
    return (2, 2, 1) if 2 * groups <= processors else (1, 2, 1) if groups <= processors else (1, 1, 1)


def gqa_mixer_decode(
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
    proj_BX = aligned_rows(proj_BX)
    (B, X), (S, G), device = proj_BX.shape, keys_MSGK.shape[1:3], proj_BX.device
    H = (X - 2 * G * K) // (2 * K)
    o_BO = torch.empty(B, H * K, dtype=proj_BX.dtype, device=device)
    if B == 0:
        return o_BO
    macros = dict(
        RATIO=H // G,
        HALF=len(frequencies_F),
        NORM_FLOAT=int(q_norm_weight_K.dtype == torch.float32),
        BLOCK=S,
    )
    # All of them, so that no batch compiles a kernel while requests wait.
    kernels = {
        form: cuda_kernel(SOURCE, "decode", THREADS, device, SPLITS=form[0], STAGES=form[1], **macros) for form in FORMS
    }
    splits, stages, parts = form_for(B * G, multiprocessors(device))
    parts_NPX = torch.empty(B * G if parts > 1 else 0, parts, H // G * (K + 2), dtype=torch.float32, device=device)
    kernels[splits, stages].launch(
        (B * G * parts * splits, 1, 1),
        shared_bytes(stages),
        proj_BX,
        q_norm_weight_K,
        k_norm_weight_K,
        frequencies_F,
        positions_B,
        keys_MSGK,
        values_MSGK,
        block_rows_B,
        block_tables_BN,
        context_lens_B,
        o_BO,
        parts_NPX,
        counters("gqa_mixer_decode", device, COUNTERS),
        (c_longlong, proj_BX.stride(0)),
        (c_longlong, block_tables_BN.stride(0)),
        (c_int, G),
        (c_int, parts),
        (c_float, eps),
        (c_float, rope_scale),
        (c_float, K**-0.5 * LOG2_E),
    )
    return o_BO
