"""Rows of the vocabulary on a CPU, in C++ (rows.cpp)."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.ops.linear.blocks_cpp import refusal as block_refusal
from thalweg.ops.toolchain.cpu_build import DTYPES, function
from thalweg.quant import PLAIN, scheme_named
from thalweg.quant.ggml import GgmlRows
from thalweg.quant.ggml_types import TYPES

if TYPE_CHECKING:
    from thalweg.ops.embedding import VocabRows, VocabRowsDims


@cache
def _run() -> Any:
    return function("vocab_rows", c_int, c_void_p, c_void_p, c_int, c_void_p, *[c_int64] * 3)


def build(dims: VocabRowsDims, dtype: torch.dtype) -> VocabRows:
    scheme, kind, rows = scheme_named(dims.scheme), -1, None
    if isinstance(scheme, GgmlRows):
        ((name, rows),) = scheme.segments
        kind = TYPES[name].id
    return partial(_rows, D=dims.D, V=rows, kind=kind, dtype=dtype)


def refusal(dims: VocabRowsDims) -> str | None:
    """Why it does not serve these dims on any CPU, or None."""
    scheme = scheme_named(dims.scheme)
    if scheme is PLAIN:
        return None
    if not isinstance(scheme, GgmlRows):
        return f"needs rows in the model's dtype or in GGML's blocks, not {dims.scheme}"
    return block_refusal(scheme)


def _rows(ids_T: Tensor, w_VD: Tensor, /, *, D: int, V: int | None, kind: int, dtype: torch.dtype) -> Tensor:
    T, V = ids_T.shape[0], w_VD.shape[0] if V is None else V
    x_TD = w_VD.new_empty(T, D, dtype=dtype)
    ids_T = ids_T.contiguous()
    if not _run()(DTYPES[dtype], ids_T.data_ptr(), w_VD.data_ptr(), kind, x_TD.data_ptr(), T, V, D):
        raise IndexError(f"ids of tokens are {int(ids_T.min())} to {int(ids_T.max())}; expected 0 to {V - 1}")
    return x_TD
