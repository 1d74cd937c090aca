"""Launches the delta rule over prompts in CUDA C++: chunks.cu, then states.cu, which say how they work."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.host_tables import Boundaries, PerStep, pieces
from thalweg.ops.norm.triton.gated import gated_rms_norm
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

CHUNKS, STATES = (Path(__file__).with_name(name) for name in ("chunks.cu", "states.cu"))
K, CHUNK, BLOCK = 128, 64, 512  # as in the sources
TILE = CHUNK * K * 2
FIXED = 3 * TILE + 10 * BLOCK + 4 * K  # bytes of a chunk of a head that all of its rows of V need
WORK = FIXED + TILE
HANDED = 2 * 12 * BLOCK  # of a warp that keeps states, for the one that makes outputs
CHUNKS_SHARED = 5 * TILE + 20 * BLOCK


def walkers(heads: int, processors: int) -> tuple[int, int]:
    """(warps of a block that keep states, stages of its ring) for so many heads of sequences together. A block fills a
    multiprocessor. One with 64 rows of V takes 1.45 times as long as one with 32, and half as many do."""
    small, large = (-(-heads * blocks // processors) for blocks in (4, 2))
    return (2, 3) if small <= 1.45 * large else (4, 2)


def kda_mixer_prefill(
    proj_TX: Tensor,
    up_T2O: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    A_log_H: Tensor,
    dt_bias_HK: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    boundaries: Boundaries = (),
) -> Tensor:
    C = len(conv_weight_CW)
    qkv_TC, beta_TH = proj_TX[:, :C], proj_TX[:, C:]
    weights = (conv_weight_CW, A_log_H, dt_bias_HK)
    states = (conv_state_NWC, state_NHVK, slots_B)
    o_THV = rule(qkv_TC, beta_TH, up_T2O[:, 0], weights, states, offsets, boundaries)
    return gated_rms_norm(o_THV, up_T2O[:, 1].unflatten(-1, (-1, K)), norm_weight_V, eps).flatten(1)


def gdn_mixer_prefill(
    proj_TX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    boundaries: Boundaries = (),
) -> Tensor:
    C, H = len(conv_weight_CW), len(A_log_H)
    qkv_TC, z_TO, b_TH, a_TH = proj_TX.split([C, H * K, H, H], dim=-1)
    weights = (conv_weight_CW, A_log_H, dt_bias_H)
    states = (conv_state_NWC, state_NHVK, slots_B)
    o_THV = rule(qkv_TC, b_TH, a_TH, weights, states, offsets, boundaries)
    return gated_rms_norm(o_THV, z_TO.unflatten(-1, (H, K)), norm_weight_V, eps, silu=True).flatten(1)


def rule(
    qkv_TC: Tensor,
    beta_TH: Tensor,
    gate_TX: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    states: tuple[Tensor, Tensor, Tensor],
    offsets: Sequence[int],
    boundaries: Boundaries = (),
) -> Tensor:
    """o_THV in bf16, of what the mixers normalise and gate. Decays come from gate_TX, of every channel or of a head,
    `weights` are the convolution's, A_log and dt_bias, `states` those of the convolution, of the rule, and slots_B."""
    conv_weight_CW, A_log_H, dt_bias = weights
    conv_state_NWC, state_NHVK, slots_B = states
    T, H, device = len(qkv_TC), len(A_log_H), qkv_TC.device
    o_THV = torch.empty(T, H, K, dtype=qkv_TC.dtype, device=device)
    if not T:
        return o_THV
    is_gdn = dt_bias.ndim == 1
    qkv_TC, gate_TX = aligned_rows(qkv_TC), gate_TX if is_gdn else aligned_rows(gate_TX)
    ratio = 2 * H // (len(conv_weight_CW) // K - H)
    cut = pieces(offsets, CHUNK, device, boundaries)
    work = torch.empty(cut.num * H * WORK, dtype=torch.uint8, device=device)
    chunks = cuda_kernel(CHUNKS, "chunks", 256, device, GDN=int(is_gdn), RATIO=ratio)
    chunks.launch(
        (cut.num * H, 1, 1),
        CHUNKS_SHARED,
        qkv_TC,
        beta_TH,
        gate_TX,
        conv_weight_CW,
        conv_state_NWC,
        A_log_H,
        dt_bias,
        slots_B,
        cut.pieces_N2,
        cut.offsets_B1,
        cut.saves_N,
        work,
        (c_longlong, qkv_TC.stride(0)),
        (c_longlong, beta_TH.stride(0)),
        (c_longlong, gate_TX.stride(0)),
        (c_int, H),
    )
    sequences = len(offsets) - 1
    long = sequences - isinstance(offsets, PerStep)  # one of a captured step is there to pad it
    warps, stages = walkers(long * H, multiprocessors(device))
    is_bf16 = state_NHVK.dtype == torch.bfloat16
    macros = {"WARPS": warps, "STAGES": stages, "STATE_BF16": int(is_bf16), "RATIO": ratio}
    walk = cuda_kernel(STATES, "states", 32 * (2 * warps + 1), device, **macros)
    walk.launch(
        (sequences * H * (8 // warps), 1, 1),
        stages * (FIXED + warps * 4 * BLOCK) + warps * HANDED,
        work,
        qkv_TC,
        conv_state_NWC,
        state_NHVK,
        slots_B,
        cut.offsets_B1,
        cut.firsts_B1,
        cut.saves_N,
        o_THV,
        (c_longlong, qkv_TC.stride(0)),
        (c_int, H),
    )
    return o_THV
