"""Experts in int4 or fp8 for a few tokens by two launches of CUDA C++ (fused.cu says how they work)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.toolchain.cuda_build import CudaKernel, aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("fused.cu")
ROWS, BUFFERS = 16, 4  # as in the source
MAX_WARPS = 14
MAX_TOKENS = 64


def slot_bytes(fp8: bool) -> int:
    """A step's weights and scales in the ring."""
    return ROWS * 128 + 16 if fp8 else ROWS * (128 + 16) + ROWS * 16


class Geometry(NamedTuple):
    """How a product is cut: warps of a block that multiply, steps of columns that each of them has, steps in a warp's
    ring, and blocks of a multiprocessor."""

    warps: int
    steps: int
    stages: int
    blocks: int

    def shared_bytes(self, fp8: bool) -> int:
        return self.warps * (self.stages * slot_bytes(fp8) + BUFFERS * 32 * 16)

    @property
    def macros(self) -> dict[str, int]:
        return {"STEPS": self.steps, "STAGES": self.stages, "BLOCKS": self.blocks}


def geometry(columns: int, fp8: bool) -> Geometry | None:
    """None if no number of warps shares out the columns. Two steps for each of 4 warps or more, so that an item is
    worth what it costs beside its steps; or else as few as possible. As many blocks as registers suffice for."""
    steps, rest = divmod(columns, 128 if fp8 else 256)
    for each, least, warps_of_all in ((2, 4, 21 if fp8 else 16), (1, 1, 21), (4, 1, 16 if fp8 else 8)):
        warps = steps // each
        if not rest and steps % each == 0 and least <= warps <= MAX_WARPS:
            return Geometry(warps, each, 4, max(1, min(6, warps_of_all // (warps + 1))))
    return None


def refusal(E: int, D: int, I: int, fp8: bool) -> str | None:
    """Why E experts I wide of a model D wide are not served."""
    if geometry(D, fp8) is None or geometry(I, fp8) is None:
        step = 128 if fp8 else 256
        return f"needs D and I of a multiple of {step} that up to {MAX_WARPS} warps share out, not {D} and {I}"
    return f"needs at most 1024 experts, not {E}" if E > 1024 else None


@cache
def _counters(device: torch.device, size: int) -> Tensor:
    """How many came to each strip of columns of each token: zero between launches, which leave them so."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError("experts ran for the first time while a graph was captured; run them once before")
    return torch.zeros(size, dtype=torch.int32, device=device)


def _kernel(ids_Tk: Tensor, cut: Geometry, columns: int, **macros: int) -> CudaKernel:
    (T, K), device = ids_Tk.shape, ids_Tk.device
    macros |= {"COLS": columns, "K": K, "TOKENS": 8 if T <= 8 else MAX_TOKENS, **cut.macros}
    return cuda_kernel(SOURCE, "experts", 32 * (cut.warps + 1), device, **macros)


def run_gate_up(
    x_TD: Tensor, ids_Tk: Tensor, words: Tensor, scales: Tensor, own: Tensor | None, cut: Geometry | None = None
) -> Tensor:
    """h bf16 = silu(gate x) * up x of every pair, [T * k, I], and behind them of every token by the own expert."""
    (T, K), (E, I2, _), D, fp8 = ids_Tk.shape, words.shape, x_TD.shape[1], words.dtype != torch.int32
    cut = cut or geometry(D, fp8)
    assert cut is not None
    x_TD = aligned_rows(x_TD)
    h = torch.empty(T * (K + (own is not None)), I2 // 2, dtype=x_TD.dtype, device=x_TD.device)
    kernel = _kernel(ids_Tk, cut, D, FP8=int(fp8), GATED=1, OUT=I2 // 2, E=E, OWN=int(own is not None))
    grid = (multiprocessors(x_TD.device) * cut.blocks, 1, 1)
    stride = (c_longlong, x_TD.stride(0))
    kernel.launch(grid, cut.shared_bytes(fp8), x_TD, ids_Tk, words, scales, _or_any(own, h), h, stride, (c_int, T))
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
    T, (E, D, _), I, fp8 = len(ids_Tk), words.shape, h.shape[1], words.dtype != torch.int32
    cut = cut or geometry(I, fp8)
    assert cut is not None
    parts = torch.empty(len(h), D, dtype=torch.float32, device=h.device)
    y_TD = torch.empty(T, D, dtype=h.dtype, device=h.device)
    kernel = _kernel(ids_Tk, cut, I, FP8=int(fp8), GATED=0, OUT=D, E=E, OWN=int(own is not None))
    kernel.launch(
        (multiprocessors(h.device) * cut.blocks, 1, 1),
        cut.shared_bytes(fp8),
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
