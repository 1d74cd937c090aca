"""Experts in int4 for a few tokens by two launches of CUDA C++ (few.cu says how they work)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.registry import Refusal
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("few.cu")
ROWS, BUFFERS, STEP = 16, 4, 256  # as in the source
MAX_WARPS = 28  # that multiply, at 64 registers
MAX_TOKENS, MAX_EXPERTS = 64, 1024
SHARED = 227 * 1024  # bytes of a multiprocessor for blocks, of which each costs 1024 more than it asks for


class Geometry(NamedTuple):
    """How a product is cut: warps of a block that multiply, steps of columns that an item has for each, stages of the
    ring, and blocks of a multiprocessor."""

    warps: int
    steps: int
    stages: int
    blocks: int

    @property
    def macros(self) -> dict[str, int]:
        return {"STEPS": self.steps, "STAGES": self.stages, "BLOCKS": self.blocks}

    @property
    def stage_bytes(self) -> int:
        """A stage of the ring: rows of weights and of scales, or of the own expert's weights."""
        piece, scales = 128 * self.warps, 16 * self.warps
        return ROWS * max(piece + 16 + scales + (0 if scales // 16 % 2 else 16), piece + 64)

    @property
    def shared_bytes(self) -> int:
        """What a launch asks for: the ring and buffers of sums."""
        return self.stages * self.stage_bytes + self.warps * BUFFERS * 32 * 16


def static_bytes(warps: int, E: int, K: int, tokens: int) -> int:
    """Of shared memory, at most, besides what a launch asks for."""
    return 10 * E + 18 * tokens * K + 256 + 32 * warps


def geometry(columns: int, E: int, K: int, tokens: int) -> Geometry | None:
    """None if no number of warps shares out the columns. What a warp does for a step is a chain, which other warps
    hide: up to 8 tokens as many as there is room for, at 64 registers; beyond, where these do not suffice, half."""
    steps, rest = divmod(columns, STEP)
    most = MAX_WARPS if tokens <= 8 else MAX_WARPS // 2
    for each in () if rest else (1, 2):
        warps = steps // each
        if warps and steps % each == 0 and warps <= most:
            blocks = min(3 if tokens <= 8 else 2, max(1, (most + 6) // (warps + 2)))
            cut = Geometry(warps, each, 1, blocks)
            room = SHARED // blocks - 1024 - static_bytes(warps, E, K, tokens) - cut.shared_bytes
            stages = min(8, 1 + room // cut.stage_bytes)
            return cut._replace(stages=stages) if stages >= 2 else None
    return None


def refusal(E: int, D: int, I: int, own: int) -> Refusal:
    """Why E experts I wide of a model D wide, with one of their own `own` wide or none (0), are not served."""
    if own not in (0, I):
        return f"needs an own expert as wide as the others, {I}, not {own}"
    if E > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, not {E}"
    if geometry(D, E, 8, MAX_TOKENS) is None or geometry(I, E, 8, MAX_TOKENS) is None:
        return f"needs D and I of a multiple of {STEP} that up to {MAX_WARPS // 2} warps share out, not {D} and {I}"
    return None


@cache
def _counters(device: torch.device, size: int) -> Tensor:
    """How many came to each strip of columns of each token: zero between launches, which leave them so."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError("experts ran for the first time while a graph was captured; run them once before")
    return torch.zeros(size, dtype=torch.int32, device=device)


def _launch(
    cut: Geometry | None, columns: int, ids_Tk: Tensor, words: Tensor, macros: dict[str, int], *args: Any
) -> None:
    (T, K), device, E = ids_Tk.shape, ids_Tk.device, len(words)
    tokens = 8 if T <= 8 else MAX_TOKENS
    cut = cut or geometry(columns, E, K, tokens)
    assert cut is not None
    macros = {"COLS": columns, "K": K, "TOKENS": tokens, "E": E} | macros | cut.macros
    kernel = cuda_kernel(SOURCE, "experts", 32 * (cut.warps + 2), device, **macros)
    kernel.launch((multiprocessors(device) * cut.blocks, 1, 1), cut.shared_bytes, *args)


def run_gate_up(
    x_TD: Tensor, ids_Tk: Tensor, words: Tensor, scales: Tensor, own: Tensor | None, cut: Geometry | None = None
) -> Tensor:
    """h bf16 = silu(gate x) * up x of every pair, [T * k, I], and behind them of every token by the own expert."""
    (T, K), I, D = ids_Tk.shape, words.shape[1] // 2, x_TD.shape[1]
    x_TD = aligned_rows(x_TD)
    h = torch.empty(T * (K + (own is not None)), I, dtype=x_TD.dtype, device=x_TD.device)
    macros = {"GATED": 1, "OUT": I, "OWN": int(own is not None)}
    args = (x_TD, ids_Tk, words, scales, _or_any(own, h), h, (c_longlong, x_TD.stride(0)), (c_int, T))
    _launch(cut, D, ids_Tk, words, macros, *args)
    return h


def run_down(
    h: Tensor,
    ids_Tk: Tensor,
    words: Tensor,
    scales: Tensor,
    own: Tensor | None,
    weights_Tk: Tensor,
    residual_TD: Tensor | None,
    scale: float,
    cut: Geometry | None = None,
) -> Tensor:
    """The weighted sum over a token's experts of down h, with what is added to it."""
    T, D, I = len(ids_Tk), words.shape[1], h.shape[1]
    parts = torch.empty(len(h), D, dtype=torch.float32, device=h.device)
    y_TD = torch.empty(T, D, dtype=h.dtype, device=h.device)
    _launch(
        cut,
        I,
        ids_Tk,
        words,
        {"GATED": 0, "OUT": D, "OWN": int(own is not None)},
        h,
        ids_Tk,
        words,
        scales,
        _or_any(own, h),
        parts,
        weights_Tk,
        (c_longlong, 0) if residual_TD is None else residual_TD,
        y_TD,
        _counters(h.device, MAX_TOKENS * D // ROWS),
        (c_longlong, 0 if residual_TD is None else residual_TD.stride(0)),
        (c_float, scale),
        (c_longlong, I),
        (c_int, T),
    )
    return y_TD


def _or_any(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An address for a kernel that is compiled not to read it."""
    return other if tensor is None else tensor


def experts(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
    own: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    if len(x_TD) == 0:
        return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    (words, scales), (down_words, down_scales), (own_gate_up, own_down) = gate_up, down, own or (None, None)
    h = run_gate_up(x_TD, ids_Tk, words, scales, own_gate_up)
    return run_down(h, ids_Tk, down_words, down_scales, own_down, weights_Tk, residual_TD, scale)
