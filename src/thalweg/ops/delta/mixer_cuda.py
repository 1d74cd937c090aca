"""Launches the decode mixers of KDA and Gated DeltaNet in CUDA C++ (mixer.cu says how they work)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cuda_build import cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("mixer.cu")
K, WARPS, PASS, MAX_ROWS, TILE_BYTES, STRIDE = 128, 8, 8, 64, 4096, 132  # as in the source
SCALES_PITCH = 16  # sequences whose scales of a head begin at a multiple of 64 bytes, for copies
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
    weights = (w_up_2OR, A_log_H, dt_bias_HK, norm_weight_V)
    o_BO, _ = _launch(proj_BX, conv_weight_CW, conv_state_NWC, weights, state_NHVK, slots_B, eps, GDN=0, RATIO=1)
    return o_BO


def gdn_mixer_decode(proj_BX: Tensor, **inputs: Any) -> Tensor:
    return _gdn(proj_BX, **inputs)[0]


def gdn_mixer_decode_float8(proj_BX: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """`gdn_mixer_decode`, before it is rounded to bf16, in e4m3 [B, H * V] over scales fp32 [H, B and up to
    SCALES_PITCH - 1 more of anything], one for each head."""
    return _gdn(proj_BX, **inputs, float8=True)


def _gdn(
    proj_BX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
    float8: bool = False,
) -> tuple[Tensor, Tensor]:
    H, weights = state_NHVK.shape[1], (A_log_H, dt_bias_H, norm_weight_V)
    ratio = 2 * H // (len(conv_weight_CW) // K - H)
    return _launch(
        proj_BX, conv_weight_CW, conv_state_NWC, weights, state_NHVK, slots_B, eps, float8, GDN=1, RATIO=ratio
    )


def _launch(
    proj_BX: Tensor,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    weights: tuple[Tensor, ...],
    state_NHVK: Tensor,
    slots_B: Tensor,
    eps: float,
    float8: bool = False,
    **macros: int,
) -> tuple[Tensor, Tensor]:
    """Outputs and, with float8, their scales."""
    B, H = slots_B.shape[0], state_NHVK.shape[1]
    o_BO = torch.empty(B, H * K, dtype=torch.float8_e4m3fn if float8 else proj_BX.dtype, device=proj_BX.device)
    scales_HB = torch.empty(H, -(-B // SCALES_PITCH) * SCALES_PITCH, device=proj_BX.device) if float8 else o_BO
    if B:
        rows = rows_per_block(B, H, multiprocessors(proj_BX.device))
        is_bf16 = state_NHVK.dtype == torch.bfloat16
        kernel = cuda_kernel(
            SOURCE, "mixer", 32 * WARPS, proj_BX.device, STATE_BF16=int(is_bf16), FLOAT8=int(float8), **macros
        )
        vectors = 4 if macros["GDN"] else 5  # q, k, v, the gate and, where channels have their own, the decay in fp32
        inputs = vectors * STRIDE * 4 * min(rows, PASS)
        stage = WARPS * TILE_BYTES
        tiles = rows * K * K * state_NHVK.element_size() // stage
        stages = min(tiles, MAX_STAGES, (kernel.shared_limit - inputs) // stage)
        kernel.launch(
            (H, -(-B // rows), 1),
            stages * stage + inputs,
            proj_BX,
            conv_weight_CW,
            conv_state_NWC,
            *weights,
            state_NHVK,
            slots_B,
            o_BO,
            scales_HB,
            (c_longlong, proj_BX.stride(0)),
            (c_int, B),
            (c_int, H),
            (c_int, rows),
            (c_int, stages),
            (c_float, eps),
        )
    return o_BO, scales_HB
