"""Launches products of many rows on Hopper (products.cu says how they work)."""

from __future__ import annotations

from ctypes import c_int, c_longlong
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.toolchain.cuda_build import cuda_kernel
from thalweg.ops.toolchain.tensor_map import tensor_map
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("products.cu")
STEP_BYTES, UNIT, BOX_ROWS, PART, THREADS = 128, 16, 128, 256, 384  # as in the source
TOLD = 8  # tiles that blocks are told of ahead
WAIT_ROWS = 48  # what a tile of linears costs beside its rows, in rows
UNITS = {1: 9, 2: 10}  # of rows of x at most in a tile, by bytes of an element: what registers hold


def most_rows(element_size: int) -> int:
    """Rows of x in a tile."""
    return UNIT * UNITS[element_size]


def shared_bytes(units: int, gated: bool, dense: bool, fp8: bool) -> int:
    """As struct Shared of the source."""
    most, later = UNIT * units, fp8 and (gated or dense)
    stages = 3 if later else 4
    scales = most + (PART if dense else 2) if fp8 else 1
    size = stages * (PART + most) * STEP_BYTES + (2 * most * STEP_BYTES if later else 4 * 2 * UNIT * STEP_BYTES)
    size += 4 * (stages * scales + 4 * (1 if dense else most) + 2 * (most if fp8 else 1))
    return -(-(-(-(-(-size // 8) * 8 + 16 * stages) // 16) * 16 + (16 + 8) * TOLD) // 1024) * 1024


def grouped(
    x_RD: Tensor,
    weights: tuple[Tensor, ...],
    sorted_P: Tensor,
    blocks_N3: Tensor,
    out_PO: Tensor,
    x_scales_R: Tensor | None = None,
    *,
    gated: bool,
    share: int,
    cluster: int = 1,
    early: bool = False,
) -> None:
    """Products of pairs with their experts' weights [E, rows, D], which in fp8 have scales of blocks behind them; then
    each row of x has one too.

    gated: out [P, rows / 2], by expert, is silu(gate x) * up x of x [P / share, D], by token. Otherwise out [P, rows],
    by token, is of x [P, D], by expert. Pairs are sorted, as `sort_pairs` of ops/moe/experts/sort.py does it, in blocks
    of at most `most_rows` rows for each block of a cluster (1 or 2), which shares the weights.

    early, in bf16: of a gated launch and of the one behind it, of its results, with nothing in between; the latter
    begins before the former ends. Their blocks have counts behind them then (`sort_pairs`).
    """
    E, rows, _ = weights[0].shape
    macros = dict(GATED=int(gated), DENSE=0, ADD=0, CLUSTER=cluster, EARLY=int(early))
    counts = (share, len(blocks_N3), 0)
    _launch(x_RD, weights, E * rows, out_PO, x_scales_R, (sorted_P, blocks_N3), counts, macros)


def dense(
    x_TD: Tensor,
    q_OD: Tensor,
    x_scales_T: Tensor,
    w_scales_BO: Tensor,
    out_TO: Tensor,
    *,
    add: bool = False,
    cluster: int = 1,
) -> None:
    """out = x w^T, both in fp8 with scales as `quantize_rows` gives them, plus what out holds if `add` is asked for.
    out's rows begin at multiples of 16 bytes, its last stride is 1."""
    T, O = out_TO.shape
    macros = dict(GATED=0, DENSE=1, ADD=int(add), CLUSTER=cluster, EARLY=0)
    blocks = dense_blocks(T, O, cluster * UNITS[1], multiprocessors(x_TD.device) // cluster)
    _launch(x_TD, (q_OD, w_scales_BO), O, out_TO, x_scales_T, (x_TD, x_TD), (1, blocks, T), macros)


@lru_cache(maxsize=4096)
def dense_blocks(T: int, O: int, units: int, processors: int) -> int:
    """Into how many blocks T rows are cut: so that tiles come out even over multiprocessors, whose cost is that of
    their rows and of the weights they wait for."""
    most, units, parts = units, -(-T // UNIT), -(-O // PART)
    least = -(-units // most)

    def cost(blocks: int) -> int:
        rows = UNIT * -(-units // blocks)
        return -(-parts * blocks // processors) * (rows + WAIT_ROWS)

    return min(range(least, min(8 * least, units) + 1), key=cost)


def _launch(
    x: Tensor,
    weights: tuple[Tensor, ...],
    rows: int,
    out: Tensor,
    x_scales: Tensor | None,
    pairs: tuple[Tensor, Tensor],
    counts: tuple[int, int, int],
    macros: dict[str, int],
) -> None:
    size, D = weights[0].element_size(), weights[0].shape[-1]
    macros = macros | dict(FP8=int(size == 1), UNITS=UNITS[size])
    weights_map = tensor_map(weights[0].view(torch.bfloat16).view(rows, 1, -1), BOX_ROWS)
    rows_map = tensor_map(x.view(torch.bfloat16).view(len(x), 1, -1), UNIT) if not macros["GATED"] else weights_map
    later = size == 1 and (macros["GATED"] or macros["DENSE"])
    shape, strides = (len(out), 1, out.shape[1]), (out.stride(0), out.stride(0), 1)
    out_map = tensor_map(out.as_strided(shape, strides), UNIT) if later else weights_map
    cuda_kernel(SOURCE, "products", THREADS, x.device, **macros).launch(
        (multiprocessors(x.device) // macros["CLUSTER"] * macros["CLUSTER"], 1, 1),
        shared_bytes(UNITS[size], bool(macros["GATED"]), bool(macros["DENSE"]), size == 1),
        (None, weights_map),
        (None, rows_map),
        (None, out_map),
        x,
        x if x_scales is None else x_scales,
        weights[-1],
        *pairs,
        out,
        (c_int, x.stride(0) * size // 16),
        (c_longlong, out.stride(0)),
        (c_int, weights[-1].stride(0) if weights[-1].ndim == 2 else 0),
        (c_int, D * size // STEP_BYTES),
        (c_int, out.shape[1]),
        (c_int, -(-out.shape[1] // (PART // 2 if macros["GATED"] else PART))),
        *((c_int, n) for n in counts),
    )
