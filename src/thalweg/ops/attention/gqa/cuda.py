"""Launches the decode mixer of gated attention in CUDA C++ (decode.cu says how it works)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("decode.cu")
K, THREADS, WARPS, PITCH, TILE_BYTES = 256, 128, 4, 528, 16896  # as in the source
FORMS = [(1, 1), (1, 2), (2, 2), (4, 1), (8, 1), (16, 1)]
"""(Blocks that share a context, a cluster; tiles of a warp's ring.) One tile leaves room for two blocks on a
multiprocessor, two for one, which is then as fast. Clusters of four blocks and more do not lie on all multiprocessors,
if they have one to a block: two blocks on some are better."""
LOG2_E = 1.4426950408889634


def shared_bytes(stages: int) -> int:
    return WARPS * stages * TILE_BYTES + 8 * K * 4 + 10 * PITCH


def form_for(groups: int, processors: int) -> tuple[int, int]:
    """Of so many contexts: blocks for all multiprocessors once, or for twice as many if they are more."""
    splits = max((n for n, _ in FORMS if n * groups <= processors), default=1)
    return splits, 2 if splits <= 2 and groups <= processors else 1


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
    splits, stages = form = form_for(B * G, multiprocessors(device))
    kernels[form].launch(
        (B * G * splits, 1, 1),
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
        (c_longlong, proj_BX.stride(0)),
        (c_longlong, block_tables_BN.stride(0)),
        (c_int, G),
        (c_float, eps),
        (c_float, rope_scale),
        (c_float, K**-0.5 * LOG2_E),
    )
    return o_BO
