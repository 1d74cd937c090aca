"""Experts in int4 for a few tokens by two launches of CUDA C++ (experts_int4.cu says how they work)."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.ops.moe.experts import INT4_COLUMNS, MAX_INT4_COLUMNS, MAX_INT4_TOKENS, Finish
from thalweg.ops.moe.experts.arrivals import arrivals, told_logits
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.tensor_map import TensorMap, tensor_map
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("experts_int4.cu")
ROWS = 16  # as in the source
MAX_WARPS = MAX_INT4_COLUMNS // INT4_COLUMNS  # that multiply, at 64 registers
MAX_TOKENS = MAX_INT4_TOKENS
RING = 38 * 1024  # bytes of stages of a block of three: what they leave is L1's, for the own expert's tokens
SHARED = 227 * 1024  # bytes of a multiprocessor for blocks, of which each costs 1024 more than it asks for


class Geometry(NamedTuple):
    """How a product is cut: warps of a block that multiply, stages of the ring, buffers of sums, and blocks of a
    multiprocessor."""

    warps: int
    stages: int
    buffers: int
    blocks: int

    @property
    def macros(self) -> dict[str, int]:
        return {"STAGES": self.stages, "BUFFERS": self.buffers, "BLOCKS": self.blocks}

    @property
    def stage_bytes(self) -> int:
        """A stage of the ring, at most: rows of weights and of scales, or of the own expert's weights."""
        piece, scales = 128 * self.warps, 16 * (self.warps + 1 - self.warps % 2)
        return -(-ROWS * max(piece + scales, piece + 64) // 1024) * 1024

    @property
    def shared_bytes(self) -> int:
        """What a launch asks for: the ring and buffers of sums."""
        return self.stages * self.stage_bytes + self.warps * self.buffers * 32 * 16


def static_bytes(E: int, K: int, tokens: int) -> int:
    """Of shared memory, at most, besides what a launch asks for."""
    return -(-(10 * E + 8 * tokens * K + 128) // 1024) * 1024


def geometry(columns: int, E: int, K: int, tokens: int) -> Geometry | None:
    """None for columns that warps do not share out. What a warp does for an item is a chain, which others hide: a
    multiprocessor has as many as its registers allow."""
    warps, rest = divmod(columns, INT4_COLUMNS)
    if rest or not 1 <= warps <= MAX_WARPS:
        return None
    blocks = min(3, max(1, (MAX_WARPS + 2) // (warps + 2)))
    cut = Geometry(warps, 1, 2, blocks)
    room = SHARED // blocks - 1024 - static_bytes(E, K, tokens) - cut.shared_bytes + cut.stage_bytes
    stages = min(8, (min(room, RING) if blocks == 3 else room) // cut.stage_bytes)
    return cut._replace(stages=stages) if stages >= 2 else None


def _launch(
    cut: Geometry | None, columns: int, ids_Tk: Tensor, words: Tensor, macros: dict[str, int], *args: Any
) -> None:
    (T, K), device, E = ids_Tk.shape, ids_Tk.device, len(words)
    tokens = at_most(T)
    cut = cut or geometry(columns, E, K, tokens)
    assert cut is not None
    macros = {"COLS": columns, "K": K, "TOKENS": tokens, "E": E} | macros | cut.macros
    words_map = (None, in_chunks(words, cut.warps))
    kernel = cuda_kernel(SOURCE, "experts", 32 * (cut.warps + 2), device, **macros)
    kernel.launch((multiprocessors(device) * cut.blocks, 1, 1), cut.shared_bytes, words_map, *args)


def at_most(tokens: int) -> int:
    """For how many tokens a kernel is made that serves these."""
    return tokens if tokens <= 1 else 8 if tokens <= 8 else MAX_TOKENS


def in_chunks(words: Tensor, warps: int) -> TensorMap:
    """Copies of 8 rows, which have what each warp has of these together, 64 times 2 bytes of a row."""
    rows_RX = words.view(torch.bfloat16).flatten(0, 1)
    R, X = rows_RX.shape
    return tensor_map(rows_RX.as_strided((warps, R, X // warps), (X // warps, X, 1)), warps, 8)


# The own expert's weights are None where it is not there; a kernel compiled not to read them is given another address.


def run_gate_up(
    x_TD: Tensor,
    ids_Tk: Tensor,
    words: Tensor,
    scales: Tensor,
    own: tuple[Tensor, Tensor] | None,
    cut: Geometry | None = None,
    *,
    own_rows: tuple[int, int] | None = None,
) -> Tensor:
    """h bf16 = silu(gate x) * up x of every pair, [T * k, I], and behind them of every token by the own expert, or of
    `own_rows`, the first one and how many."""
    (T, K), I, D = ids_Tk.shape, words.shape[1] // 2, x_TD.shape[1]
    x_TD = aligned_rows(x_TD)
    first, count = (own_rows or (0, T)) if own else (0, 0)
    h = torch.empty(T * K + count, I, dtype=x_TD.dtype, device=x_TD.device)
    macros = {"GATED": 1, "OUT": I, "OWN": at_most(count), "ENDS": 0}
    args = (
        x_TD,
        ids_Tk,
        scales,
        own[0] if own else h,
        h,
        (c_longlong, x_TD.stride(0)),
        (c_int, T),
        (c_int, first),
        (c_int, count),
    )
    _launch(cut, D, ids_Tk, words, macros, *args)
    return h


def run_routed_gate_up(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    router_ED: Tensor,
    bias_E: Tensor,
    K: int,
    router_scale: float,
    words: Tensor,
    scales: Tensor,
    own: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As run_gate_up of the norm of one token x, and the choice of its experts: (h, weights_Tk, ids_Tk)."""
    I, D, E, device = words.shape[1] // 2, x_TD.shape[1], len(words), x_TD.device
    x_TD = aligned_rows(x_TD)
    h = torch.empty(K + 1, I, dtype=x_TD.dtype, device=device)
    weights_Tk = torch.empty(1, K, dtype=torch.float32, device=device)
    ids_Tk = torch.empty(1, K, dtype=torch.int64, device=device)
    args = (
        x_TD,
        ids_Tk,
        scales,
        own[0],
        h,
        norm_weight_D,
        router_ED,
        bias_E,
        told_logits("int4", D, device, E),
        weights_Tk,
        (c_float, eps),
        (c_float, router_scale),
        (c_longlong, x_TD.stride(0)),
        (c_int, 1),
        (c_int, 0),
        (c_int, 1),
    )
    _launch(None, D, ids_Tk, words, {"GATED": 1, "OUT": I, "OWN": 1, "ENDS": 0, "ROUTES": 1}, *args)
    return h, weights_Tk, ids_Tk


def run_down(
    h: Tensor,
    ids_Tk: Tensor,
    words: Tensor,
    scales: Tensor,
    own: tuple[Tensor, Tensor] | None,
    weights_Tk: Tensor | None,
    residual_TD: Tensor | None,
    scale: float,
    cut: Geometry | None = None,
) -> Tensor:
    """With weights y [T, D], the weighted sum over a token's experts of down h, with what is added to it; without them
    what every pair adds to it, and behind them the own expert of the tokens whose rows h has behind them, in fp32."""
    (T, K), D, I = ids_Tk.shape, words.shape[1], h.shape[1]
    count = len(h) - T * K
    parts = torch.empty(len(h), D, dtype=torch.float32, device=h.device)
    y_TD, ends = parts, weights_Tk is not None
    if ends:
        y_TD = torch.empty(T, D, dtype=h.dtype, device=h.device)
    _launch(
        cut,
        I,
        ids_Tk,
        words,
        {"GATED": 0, "OUT": D, "OWN": at_most(count), "ENDS": int(ends)},
        h,
        ids_Tk,
        scales,
        own[1] if own else h,
        parts,
        parts if weights_Tk is None else weights_Tk,
        (c_longlong, 0) if residual_TD is None else residual_TD,
        y_TD,
        arrivals(h.device, MAX_TOKENS * D),
        (c_longlong, 0 if residual_TD is None else residual_TD.stride(0)),
        (c_float, scale),
        (c_longlong, I),
        (c_int, T),
        (c_int, 0),
        (c_int, count),
    )
    return y_TD


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
    finish: Finish | None = None,
) -> Tensor:
    if len(x_TD) == 0:
        y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        return y_TD if finish is None else finish(y_TD)
    (words, scales), (down_words, down_scales) = gate_up, down
    h = run_gate_up(x_TD, ids_Tk, words, scales, own)
    if finish is not None and own is None:
        return finish(run_down(h, ids_Tk, down_words, down_scales, None, None, None, 1.0), weights_Tk=weights_Tk)
    y_TD = run_down(h, ids_Tk, down_words, down_scales, own, weights_Tk, residual_TD, scale)
    return y_TD if finish is None else finish(y_TD)


def gathered_experts(
    x_AD: Tensor,
    apart: Callable[[], Tensor],
    weights_Ak: Tensor,
    ids_Ak: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    own: tuple[Tensor, Tensor],
    finish: Finish,
    /,
    *,
    own_rows: tuple[int, int],
) -> Tensor:
    """Op "gathered_experts"."""
    if len(x_AD) == 0:
        return apart()
    (words, scales), (down_words, down_scales) = gate_up, down
    h = run_gate_up(x_AD, ids_Ak, words, scales, own, own_rows=own_rows)
    parts, pairs = run_down(h, ids_Ak, down_words, down_scales, own, None, None, 1.0), ids_Ak.numel()
    return finish(parts[:pairs], weights_Tk=weights_Ak, own_TD=parts[pairs:])
