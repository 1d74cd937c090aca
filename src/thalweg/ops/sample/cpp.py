"""Sampling on a CPU, in C++ (sample.cpp)."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    return function("sample", c_int, c_void_p, c_int64, *[c_void_p] * 4, c_int, c_void_p, c_int64, c_int64, c_int)


def sample(
    logits_RV: Tensor,
    temperatures_R: Tensor,
    seeds_R: Tensor,
    positions_R: Tensor,
    slots_R: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    R, V = logits_RV.shape
    ids_R = positions_R.new_empty(R)
    _run()(
        DTYPES[logits_RV.dtype],
        logits_RV.data_ptr(),
        logits_RV.stride(0),
        temperatures_R.data_ptr(),
        seeds_R.data_ptr(),
        positions_R.data_ptr(),
        None if slots_R is None else slots_R.data_ptr(),
        check,
        ids_R.data_ptr(),
        R,
        V,
        torch.get_num_threads(),
    )
    return ids_R
