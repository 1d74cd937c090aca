"""Host values on their way to the device without a wait, and what a prefill's kernels need to know of its sequences.

Kernels are compiled for what their arguments look like. They are told not to look at what changes from step to step,
counts and where in a table a part of it begins, or they would be compiled again while requests wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """The values (integers of a list become int64) on `device`. The copy is queued; nobody waits for it."""
    tensor = torch.from_numpy(np.asarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache(maxsize=16)
def table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The values as int32 on `device`. The layers of a step ask alike, and get the same tensor."""
    return to_device(np.array(values, dtype=np.int32), device)


class Pieces(NamedTuple):
    """The tokens of a prefill cut into pieces of at most `size` tokens, none of which spans two sequences."""

    num: int
    pieces_N2: Tensor  # int32: sequence, its first token here
    offsets_B1: Tensor  # int32: sequence b owns tokens offsets[b]:offsets[b + 1]
    firsts_B1: Tensor  # int32: and pieces firsts[b]:firsts[b + 1]
    saves_N: Tensor  # int32: where the state at the piece's end is written besides; 0: nowhere


Boundaries = Sequence[tuple[int, int, int]]
"""(sequence, tokens of it, slot): after so many tokens its state is written into that slot too."""


def pieces(offsets: Sequence[int], size: int, device: torch.device, boundaries: Boundaries = ()) -> Pieces:
    """The pieces of sequences with these offsets. The layers of a step ask alike, and get the same tensors."""
    return _pieces(tuple(offsets), size, device, tuple(boundaries))


@lru_cache(maxsize=8)
def _pieces(
    offsets: tuple[int, ...], size: int, device: torch.device, boundaries: tuple[tuple[int, int, int], ...]
) -> Pieces:
    starts = np.array(offsets, dtype=np.int32)
    counts = -(-np.diff(starts) // size)
    firsts = np.concatenate(([0], counts.cumsum()))
    sequence = np.repeat(np.arange(len(counts)), counts)
    token = starts[sequence] + (np.arange(len(sequence)) - firsts[sequence]) * size
    saves = np.zeros(len(sequence))
    for b, tokens, slot in boundaries:
        assert tokens in range(size, starts[b + 1] - starts[b] + 1, size), "a state is there at a piece's end"
        saves[firsts[b] + tokens // size - 1] = slot
    table = np.concatenate((np.stack((sequence, token), 1).ravel(), starts, firsts, saves)).astype(np.int32)
    on_device = to_device(table, device)
    N, B1 = len(sequence), len(starts)
    both, offsets_B1, firsts_B1, saves_N = on_device.split([2 * N, B1, B1, N])
    return Pieces(N, both.view(N, 2), offsets_B1, firsts_B1, saves_N)
