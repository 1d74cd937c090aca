"""Launches attention of prompts in CUDA C++ (prompt.cu says how it works): "mla_prefill" and "gqa_prefill"."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong
from functools import lru_cache
from itertools import pairwise
from math import gcd
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thalweg.ops.host_tables import Contexts, PerStep, StepSequences, to_device
from thalweg.ops.toolchain.cuda_build import CudaKernel, aligned_rows, cuda_kernel
from thalweg.ops.toolchain.tensor_map import TensorMap, tensor_map
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("prompt.cu")
QUERIES, THREADS, STAGES, RECORD = 128, 384, 2, 8  # as in the source
LATENT_TILE, GROUPED_TILE = 128, 80  # keys of a tile
LEAST_TILES, MOST_PARTS = 16, 16  # of a part of a piece; of a piece, which has four times as many tiles at least
LOG2_E = 1.4426950408889634


def shared_bytes(tile: int, key_dims: int, value_dims: int) -> int:
    """Queries, two tiles of keys and of values, and barriers."""
    return 2 * (QUERIES * key_dims + STAGES * tile * (key_dims + value_dims)) + 128


def grouped_macros(ratio: int, block: int, part: int) -> dict[str, int]:
    box = gcd(GROUPED_TILE, block)
    return dict(LATENT=0, TILE=GROUPED_TILE, RATIO=ratio, BOX=box, BLOCK=block, PART=part)


def latent_macros(part: int) -> dict[str, int]:
    return dict(LATENT=1, TILE=LATENT_TILE, RATIO=1, BOX=LATENT_TILE, BLOCK=1, PART=part)


def gqa_prefill(
    q_THK: Tensor,
    proj_TX: Tensor,
    *,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_tables_BN: Tensor,
    starts: Sequence[int],
    offsets: Sequence[int],
) -> Tensor:
    (T, H, K), (S, G), device = q_THK.shape, keys_MSGK.shape[1:3], q_THK.device
    proj_TX = aligned_rows(proj_TX)
    o_TO = torch.empty(T, H * K, dtype=q_THK.dtype, device=device)
    processors = multiprocessors(device)
    pieces_N8, parts = _pieces(offsets, starts, GROUPED_TILE, device, at_once=processors // H)
    box = gcd(GROUPED_TILE, S)
    keys, values = (tensor_map(x.flatten(0, 1), box) for x in (keys_MSGK, values_MSGK))
    # Both, so that no long prefix compiles a kernel while requests wait.
    kernels = [
        cuda_kernel(SOURCE, name, THREADS, device, **grouped_macros(H // G, S, part))
        for name, part in (("attend", 0), ("attend", 2), ("join", 2))
    ]
    sums: tuple[Tensor, ...] = (o_TO, o_TO, o_TO)
    if parts > 1:
        acc_PTHK = torch.empty(parts, T, H, K, dtype=torch.float32, device=device)
        sums = acc_PTHK, acc_PTHK.new_full((parts, T, H), -torch.inf), acc_PTHK.new_empty(parts, T, H)
    _launch(
        kernels[parts > 1],
        (tensor_map(q_THK, QUERIES), keys, values, keys),
        pieces_N8,
        (block_tables_BN, proj_TX, o_TO, *sums),
        (block_tables_BN.stride(0), proj_TX.stride(0)),
        (T, H, 0, K**-0.5),
        shared_bytes(GROUPED_TILE, K, K),
    )
    if parts > 1:
        kernels[2].launch(
            (-(-T * H * 32 // THREADS), 1, 1),
            0,
            *sums,
            proj_TX,
            o_TO,
            (c_longlong, proj_TX.stride(0)),
            (c_int, T),
            (c_int, H),
            (c_int, parts),
            (c_float, K**-0.5 * LOG2_E),
        )
    return o_TO


def attend_latent(
    q_LHX: Tensor,
    kv_SHX: Tensor,
    latent_SC: Tensor,
    o_LHV: Tensor,
    sums: tuple[Tensor, ...],
    offsets: Sequence[int],
    starts: Sequence[int],
    part: Contexts,
    scale: float,
) -> None:
    """As mla.expanded.Attend says, of heads of 128 + 64 dims with values of 128."""
    H, device = q_LHX.shape[1], q_LHX.device
    q_LHX = aligned_rows(q_LHX.flatten(1)).unflatten(1, (H, -1))
    of = (part.first, part.total) if sums else None
    pieces_N8, _ = _pieces(offsets, starts, LATENT_TILE, device, of, rows=True)
    acc, most, total = sums or (o_LHV, o_LHV, o_LHV)
    kv = tensor_map(kv_SHX, LATENT_TILE)
    # Both, so that no long context compiles a kernel while requests wait.
    kernels = [cuda_kernel(SOURCE, "attend", THREADS, device, **latent_macros(of_part)) for of_part in (0, 1)]
    _launch(
        kernels[bool(sums)],
        (tensor_map(q_LHX, QUERIES), kv, kv, tensor_map(latent_SC.unsqueeze(1), LATENT_TILE)),
        pieces_N8,
        (pieces_N8, o_LHV, o_LHV, acc, most, total),
        (0, 0),
        (len(q_LHX), H, latent_SC.shape[1] - 64, scale),
        shared_bytes(LATENT_TILE, 192, 128),
    )


def _launch(
    kernel: CudaKernel,
    maps: Sequence[TensorMap],
    pieces_N8: Tensor,
    tensors: Sequence[Tensor],
    strides: tuple[int, int],
    numbers: tuple[int, int, int, float],
    shared: int,
) -> None:
    (T, H, shared_column, scale), device, num = numbers, pieces_N8.device, len(pieces_N8)
    if num == 0:
        return
    kernel.launch(
        (min(multiprocessors(device), num * H), 1, 1),
        shared,
        *((None, each) for each in maps),
        pieces_N8,
        *tensors,
        *((c_longlong, each) for each in strides),
        (c_int, num),
        (c_int, T),
        (c_int, H),
        (c_int, shared_column),
        (c_float, scale * LOG2_E),
    )


def _pieces(
    offsets: Sequence[int],
    starts: Sequence[int],
    tile: int,
    device: torch.device,
    part: tuple[int, int] | None = None,
    rows: bool = False,
    at_once: int = 0,
) -> tuple[Tensor, int]:
    """int32 [pieces, 8], as in the source: QUERIES queries of a sequence each, those that see most first. And in how
    many parts their keys are cut, in a captured step at most: as many as let `at_once` pieces run side by side, if they
    are few and see much. The layers of a step ask alike, and get the same tensor.

    The keys of a sequence are all of its tokens, or of a single one a `part`: (the first, how many). With `rows` the
    keys of all sequences lie one after another, otherwise in blocks.
    """
    if isinstance(offsets, PerStep):
        limits = offsets.tables.limits
        most = _num_parts(max(1, limits.tokens // QUERIES), limits.context // tile, at_once)
        num = (limits.tokens // QUERIES + limits.sequences) * most

        def make(step: StepSequences) -> np.ndarray:
            every = np.zeros((num, RECORD), dtype=np.int32)  # those with no tiles are nobody's
            found = cut(step.offsets, step.starts, tile, None, rows)
            found = in_parts(found, min(most, _parts_of(found, at_once)), tile)
            every[: len(found)] = found
            return every.ravel()

        return offsets.tables.table(("attention", tile, rows), num * RECORD, make).view(num, RECORD), most
    return _pieces_of(tuple(offsets), tuple(starts), tile, device, part, rows, at_once)


@lru_cache(maxsize=16)
def _pieces_of(
    offsets: tuple[int, ...],
    starts: tuple[int, ...],
    tile: int,
    device: torch.device,
    part: tuple[int, int] | None,
    rows: bool,
    at_once: int,
) -> tuple[Tensor, int]:
    every = cut(offsets, starts, tile, part, rows)
    parts = _parts_of(every, at_once)
    return to_device(in_parts(every, parts, tile), device), parts


def _parts_of(every: np.ndarray, at_once: int) -> int:
    """In how many parts to cut the pieces, of which those that see little, as what pads a step, do not count."""
    long = int((every[:, 5] >= 4 * LEAST_TILES).sum())
    return _num_parts(long, int(every[0, 5]), at_once) if long else 1


def _num_parts(pieces: int, tiles: int, at_once: int) -> int:
    """In how many parts to cut so many pieces of so many tiles; fewer tiles are no sooner done, for the launches that
    it adds."""
    return max(1, min(at_once // pieces, tiles // LEAST_TILES, MOST_PARTS)) if tiles >= 4 * LEAST_TILES else 1


def cut(
    offsets: Sequence[int], starts: Sequence[int], tile: int, part: tuple[int, int] | None, rows: bool
) -> np.ndarray:
    pieces, row = [np.empty((0, RECORD), dtype=np.int32)], 0
    for b, ((first, end), start) in enumerate(zip(pairwise(offsets), starts, strict=True)):
        token = np.arange(first, end, QUERIES)
        position = start + token - first
        lo, hi = (0, start + end - first) if part is None else (part[0], sum(part))
        seen = np.minimum(hi, position + np.minimum(QUERIES, end - token)) - lo
        piece = np.zeros((len(token), RECORD), dtype=np.int32)
        piece[:, 0], piece[:, 1], piece[:, 2], piece[:, 3], piece[:, 4] = token, end, position, lo, hi
        piece[:, 5], piece[:, 6] = -(-seen // tile), row if rows else b
        pieces.append(piece[seen > 0])
        row += hi - lo if end > first else 0
    every = np.concatenate(pieces)
    return every[np.argsort(-every[:, 5], kind="stable")]


def in_parts(every: np.ndarray, parts: int, tile: int) -> np.ndarray:
    """The pieces once for each part of their tiles, without parts that have none."""
    found = []
    for part in range(parts):
        piece = every.copy()
        begin, end = every[:, 5] * part // parts, every[:, 5] * (part + 1) // parts
        piece[:, 3] += begin * tile
        piece[:, 5], piece[:, 7] = end - begin, part
        found.append(piece[end > begin])
    return np.concatenate(found)
