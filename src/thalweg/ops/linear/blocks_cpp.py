"""Matrices in GGML's blocks for C++ on a CPU, and their products."""

from __future__ import annotations

from ctypes import Array, c_int32, c_int64
from functools import partial
from typing import NamedTuple

from torch import Tensor

from thalweg.ops.linear.cpp import product
from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.registry import Refusal
from thalweg.quant import GgmlRows
from thalweg.quant.ggml_types import TYPES

BLOCKS = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # those that int8_types.h has code for
SERVED = (*BLOCKS, "F16", "BF16", "F32")  # and blocks.cpp


class Segments(NamedTuple):
    """How many segments a matrix has, their types' numbers, and how many rows each has."""

    segments: int
    types: Array[c_int32]
    rows: Array[c_int64]

    @staticmethod
    def of(scheme: GgmlRows) -> Segments:
        n = len(scheme.segments)
        types = (TYPES[name].id for name, _ in scheme.segments)
        return Segments(n, (c_int32 * n)(*types), (c_int64 * n)(*(rows for _, rows in scheme.segments)))


def refusal(scheme: GgmlRows, *, rounds: bool = False) -> Refusal:
    """Why C++ does not serve matrices stored so, or None; rounds: with activations rounded to 8 bits."""
    served = BLOCKS if rounds else SERVED
    unserved = sorted({name for name, _ in scheme.segments if name not in served})
    return f"has no code for {', '.join(unserved)}" if unserved else None


class BlockLinear:
    """y_TO = x @ w.T of w in GGML's blocks, as op "linear_ggml" says; rounds: of x rounded to 8 bits; many: for
    prompts."""

    def __init__(self, scheme: GgmlRows, *, rounds: bool = False, many: bool = False) -> None:
        self._product = partial(product, layout=Segments.of(scheme), rounds=rounds, many=many)
        self._tile = scheme.tile
        self._rows = sum(rows for _, rows in scheme.segments)

    def __call__(
        self,
        x_TD: Tensor,
        blocks: Tensor,
        /,
        *,
        norm_weight_D: Tensor | None = None,
        eps: float = 0.0,
        residual_TO: Tensor | None = None,
    ) -> Tensor:
        if self._tile is not None and norm_weight_D is not None:
            x_TD, norm_weight_D = rms_norm(x_TD, norm_weight_D, eps), None
        if self._tile is not None:  # columns of w are in a file's order: x follows them
            R, G, V = self._tile
            x_TD = x_TD.unflatten(-1, (G, R, V)).transpose(-3, -2).flatten(-3)
        y_TO = x_TD.new_empty(x_TD.shape[0], self._rows)
        return self._product(x_TD, blocks, y_TO, norm_weight_D=norm_weight_D, eps=eps, residual_TO=residual_TO)
