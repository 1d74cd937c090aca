"""Launches the decode mixer of gated attention in CUDA C++ (decode.cu says how it works)."""

from __future__ import annotations

import math
from ctypes import c_float, c_int, c_longlong
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.toolchain.cuda_build import CudaKernel, aligned_rows, cuda_kernel
from thalweg.ops.toolchain.tensor_map import tensor_map

SOURCE = Path(__file__).with_name("decode.cu")
K, THREADS, WARPS, PITCH, TILE_BYTES = 256, 128, 4, 528, 16384  # as in the source
TOKENS = 16  # of a tile
CHOICES = [(1, 1), *((splits, 2) for splits in (1, 2, 3, 4, 5, 6, 8, 12, 16))]  # the first of equals
LOG2_E = 1.4426950408889634


def shared_bytes(stages: int) -> int:
    return WARPS * stages * TILE_BYTES + 8 * K * 4 + 10 * PITCH + 8 * 4 * 2 * (WARPS + 1) + 8 * WARPS * stages


def kernel_for(device: torch.device, stages: int, **macros: int) -> CudaKernel:
    return cuda_kernel(SOURCE, "decode", THREADS, device, STAGES=stages, **macros)


@lru_cache(maxsize=1024)
def cut(groups: int, device: torch.device, **macros: int) -> tuple[int, int]:
    """(blocks that share a context, a cluster, tiles of a warp's ring) with which the device is done first with so many
    contexts, if they are alike.

    As many clusters run at once as the driver says. A block has some work beside its tokens. Two stages leave room for
    one block on a multiprocessor, which is enough to keep it busy; one leaves room for two, of which one works while
    another begins or ends.
    """

    def time(choice: tuple[int, int]) -> float:
        splits, stages = choice
        at_once = kernel_for(device, stages, **macros).at_once(shared_bytes(stages), splits)
        rounds = -(-groups // at_once) if at_once else math.inf
        return rounds * (1 / splits + 0.02) * (2.0 if stages == 1 else 1.0)

    return min(CHOICES, key=time)


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
    splits, stages = cut(B * G, device, **macros)
    kernel_for(device, stages, **macros).launch(
        (B * G * splits, 1, 1),
        shared_bytes(stages),
        *((None, tensor_map(x.flatten(0, 1), TOKENS)) for x in (keys_MSGK, values_MSGK)),
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
        (c_int, splits),
        (c_float, eps),
        (c_float, rope_scale),
        (c_float, K**-0.5 * LOG2_E),
        cluster=splits,
    )
    return o_BO
