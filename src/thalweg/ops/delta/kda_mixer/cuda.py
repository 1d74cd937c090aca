"""Launches the KDA decode mixer in CUDA C++ (mixer.cu says how it works)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.toolchain.cuda_build import cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("mixer.cu")
K, WARPS, PASS, MAX_ROWS, TILE_BYTES, STRIDE = 128, 8, 8, 64, 4096, 132  # as in the source
MAX_STAGES = 16


def rows_per_block(B: int, H: int, processors: int) -> int:
    """Sequences of a block: as few as let every multiprocessor have one block, which fills it."""
    groups = max(1, min(B, processors // H), -(-B // MAX_ROWS))
    return -(-B // groups)


def kda_mixer_decode(
    proj_BX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    w_up_2OR: Tensor,
    A_log_H: Tensor,
    dt_bias_HK: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> Tensor:
    B, H = slots_B.shape[0], dt_bias_HK.shape[0]
    o_BO = torch.empty(B, H * K, dtype=proj_BX.dtype, device=proj_BX.device)
    if B:
        rows = rows_per_block(B, H, multiprocessors(proj_BX.device))
        is_bf16 = state_NHVK.dtype == torch.bfloat16
        kernel = cuda_kernel(SOURCE, "kda_mixer", 32 * WARPS, proj_BX.device, STATE_BF16=int(is_bf16))
        inputs = 5 * STRIDE * 4 * min(rows, PASS)  # q, k, v, decay and gate of a pass in fp32
        stage = WARPS * TILE_BYTES
        tiles = rows * K * K * state_NHVK.element_size() // stage
        stages = min(tiles, MAX_STAGES, (kernel.shared_limit - inputs) // stage)
        kernel.launch(
            (H, -(-B // rows), 1),
            stages * stage + inputs,
            proj_BX,
            conv_weight_CW,
            conv_state_NWC,
            w_up_2OR,
            A_log_H,
            dt_bias_HK,
            norm_weight_V,
            state_NHVK,
            slots_B,
            o_BO,
            (c_longlong, proj_BX.stride(0)),
            (c_int, B),
            (c_int, H),
            (c_int, rows),
            (c_int, stages),
            (c_float, eps),
        )
    return o_BO
