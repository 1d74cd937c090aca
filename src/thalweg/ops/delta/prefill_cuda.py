"""Launches the delta rule over prompts in CUDA C++: kda_chunks.cu, segments.cu for few heads, and states.cu, or Gated
DeltaNet's, whose names begin with gdn. gdn_prompt.cu does the work of all for one prompt. They say how they work."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.host_tables import Boundaries, PerStep, pieces
from thalweg.ops.toolchain.counters import counters
from thalweg.ops.toolchain.cuda_build import CudaKernel, aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

FOLDER = Path(__file__).parent
KDA_CHUNKS, SEGMENTS, STATES = (FOLDER / f"{name}.cu" for name in ("kda_chunks", "segments", "states"))
GDN_CHUNKS, GDN_SEGMENTS, GDN_STATES, GDN_PROMPT = (
    FOLDER / f"gdn_{name}.cu" for name in ("chunks", "segments", "states", "prompt")
)
K, CHUNK, BLOCK = 128, 64, 512  # as in the sources
TILE = CHUNK * K * 2
FIXED = 3 * TILE + 10 * BLOCK + 4 * K  # bytes of a chunk of a head that all of its rows of V need
WORK = FIXED + TILE + 8 * 4 * CHUNK  # with sums of squares
MOVE = 2 * 4 * K * K  # bytes of what a segment makes of a head's state
WARPS, STAGES = 2, 3  # of a block of states.cu, which has 16 rows of V for each
HANDED = 2 * 12 * BLOCK  # of a warp that keeps states, for those that make outputs
STATES_SHARED = STAGES * (FIXED + WARPS * 4 * BLOCK) + WARPS * HANDED
INPUT = (CHUNK + 3) * 2 * K  # of a convolution
KDA_SHARED, GDN_SHARED = 5 * TILE + 20 * BLOCK, 3 * INPUT + 20 * BLOCK
# Of Gated DeltaNet: what a chunk's heads share, what a block of gdn_states.cu needs of a head beside that (T, P,
# factors, 64 rows of V), and the bytes of a head.
GDN_KEYS, GDN_PART = 2 * TILE, TILE // 2 + 10 * BLOCK + 1024 + TILE // 2
GDN_HEAD = GDN_PART + TILE // 2 + 2 * 4 * CHUNK
ALIGNED = 1024  # for the beginning of a ring
GDN_STATES_SHARED = 3 * (GDN_KEYS + GDN_PART) + 2 * 3 * TILE // 2 + ALIGNED
GDN_SEGMENTS_STAGES = 3
GDN_SEGMENTS_SHARED = GDN_SEGMENTS_STAGES * (TILE + TILE // 2 + 1024 + TILE // 2) + ALIGNED


@dataclass(frozen=True)
class Form:
    """Kernels as (source, threads, bytes of shared memory), and how many blocks walk a head."""

    chunks: tuple[Path, int, int]
    segments: tuple[Path, int, int]
    stages: int  # of the ring of `segments`
    states: tuple[Path, int, int]
    blocks: int

    def work(self, key_heads: int, heads: int) -> int:
        """Bytes of a chunk."""
        return key_heads * GDN_KEYS + heads * GDN_HEAD if self is GDN else heads * WORK


KDA = Form(
    (KDA_CHUNKS, 256, KDA_SHARED),
    (SEGMENTS, 160, 4 * (2 * TILE + 4 * K + 16 * BLOCK)),
    4,
    (STATES, 256, STATES_SHARED),
    8 // WARPS,
)
GDN = Form(
    (GDN_CHUNKS, 256, GDN_SHARED),
    (GDN_SEGMENTS, 160, GDN_SEGMENTS_SHARED),
    GDN_SEGMENTS_STAGES,
    (GDN_STATES, 512, GDN_STATES_SHARED),
    2,
)


GDN_AT_ONCE = (GDN_PROMPT, 512, GDN_STATES_SHARED)  # which is more than two chunks under way need
GDN_FLAGS = 1 << 18  # int32: counters, and flags of chunks and walkers


def rounds_at_once(sequences: int, heads: int, chunks: int, processors: int) -> int | None:
    """How many chunks a team of gdn_prompt.cu makes before its block walks a head; None: another form is faster. It is
    for one sequence whose heads, two blocks each, leave about half of the multiprocessors for making chunks. The more
    chunks, the later they are walked, so that walking the last ones waits for none."""
    walkers = 2 * heads
    if sequences > 1 or chunks < 16 or 4 + chunks * walkers > GDN_FLAGS:
        return None
    return max(1, chunks // 48) if processors <= 3 * walkers <= 2 * processors else None


def segments(heads: int, chunks: int, processors: int, blocks: int = 8 // WARPS) -> int:
    """How many parts a sequence of so many chunks is walked in, side by side, for so many heads of sequences together,
    with so many blocks each. That walks most of them twice, and pays from three on."""
    count = min(8, processors // (blocks * heads))
    return count if count > 2 and chunks >= 16 * count else 1


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
    gates = (up_T2O[:, 0], up_T2O[:, 1])
    return _mixer(qkv_TC, beta_TH, gates, weights, states, (norm_weight_V, eps), offsets, boundaries)


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
    return _mixer(qkv_TC, b_TH, (a_TH, z_TO), weights, states, (norm_weight_V, eps), offsets, boundaries)


def _mixer(
    qkv_TC: Tensor,
    beta_TH: Tensor,
    gates: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
    states: tuple[Tensor, Tensor, Tensor],
    norm: tuple[Tensor, float],
    offsets: Sequence[int],
    boundaries: Boundaries,
) -> Tensor:
    """out_TO. `gates`: what the decays come from, of every channel or, for Gated DeltaNet, of a head, and what gates
    outputs; `weights`: the convolution's, A_log and dt_bias; `states`: the convolution's, the rule's, slots_B; `norm`:
    its weight and eps."""
    conv_weight_CW, A_log_H, dt_bias = weights
    conv_state_NWC, state_NHVK, slots_B = states
    (gate_TX, gate_TO), (norm_weight_V, eps) = gates, norm
    T, H, device = len(qkv_TC), len(A_log_H), qkv_TC.device
    out_TO = torch.empty(T, H * K, dtype=qkv_TC.dtype, device=device)
    if not T:
        return out_TO
    is_gdn = dt_bias.ndim == 1
    form = GDN if is_gdn else KDA

    def kernel(of: tuple[Path, int, int], **macros: int) -> tuple[CudaKernel, int]:
        source, threads, shared = of
        return cuda_kernel(source, source.stem, threads, device, **macros), shared

    qkv_TC, gate_TO = aligned_rows(qkv_TC), aligned_rows(gate_TO)
    gate_TX = gate_TX if is_gdn else aligned_rows(gate_TX)
    ratio = 2 * H // (len(conv_weight_CW) // K - H)
    shape = {"RATIO": ratio} if is_gdn else {}
    cut = pieces(offsets, CHUNK, device, boundaries)
    work = torch.empty(cut.num * form.work(H // ratio, H), dtype=torch.uint8, device=device)
    prompt = (qkv_TC, beta_TH, gate_TX, conv_weight_CW, conv_state_NWC, A_log_H, dt_bias, slots_B, cut.pieces_N2)
    strides = tuple((c_longlong, x.stride(0)) for x in (qkv_TC, beta_TH, gate_TX))
    sequences = len(offsets) - 1
    long = max(1, sequences - isinstance(offsets, PerStep))  # one of a captured step is there to pad it
    state_bf16, norm_bf16 = (int(x.dtype == torch.bfloat16) for x in (state_NHVK, norm_weight_V))
    dtypes = {"STATE_BF16": state_bf16, "NORM_BF16": norm_bf16}
    processors = multiprocessors(device)
    if is_gdn and (rounds := rounds_at_once(long, H, cut.num, processors)) is not None:
        both, shared = kernel(GDN_AT_ONCE, **dtypes, **shape)
        both.launch(
            (processors, 1, 1),
            shared,
            *prompt,
            cut.offsets_B1,
            cut.firsts_B1,
            cut.saves_N,
            work,
            gate_TO,
            norm_weight_V,
            state_NHVK,
            out_TO,
            counters("gdn_prompt", device, GDN_FLAGS),
            *strides,
            (c_longlong, gate_TO.stride(0)),
            (c_float, eps),
            (c_int, H),
            (c_int, sequences),
            (c_int, cut.num),
            (c_int, rounds),
        )
        return out_TO
    chunks, shared = kernel(form.chunks, **shape)
    chunks.launch(
        (cut.num * (H // ratio), 1, 1), shared, *prompt, cut.offsets_B1, cut.saves_N, work, *strides, (c_int, H)
    )
    count, moves = segments(long * H, cut.num // long, processors, form.blocks), work
    if count > 1:
        moves = torch.empty(sequences * (count - 1) * H * MOVE, dtype=torch.uint8, device=device)
        ahead, shared = kernel(form.segments, STAGES=form.stages, STATE_BF16=state_bf16, **shape)
        ahead.launch(
            (sequences * (count - 1) * H * 4, 1, 1),
            shared,
            work,
            state_NHVK,
            slots_B,
            cut.offsets_B1,
            cut.firsts_B1,
            moves,
            (c_int, H),
            (c_int, count),
        )
    walk, shared = kernel(form.states, SPLIT=int(count > 1), **dtypes, **shape)
    walk.launch(
        (sequences * count * H * form.blocks, 1, 1),
        shared,
        work,
        qkv_TC,
        gate_TO,
        norm_weight_V,
        conv_state_NWC,
        state_NHVK,
        slots_B,
        cut.offsets_B1,
        cut.firsts_B1,
        *(() if is_gdn else (cut.saves_N,)),
        moves,
        out_TO,
        (c_longlong, qkv_TC.stride(0)),
        (c_longlong, gate_TO.stride(0)),
        (c_float, eps),
        (c_int, H),
        (c_int, count),
    )
    return out_TO
