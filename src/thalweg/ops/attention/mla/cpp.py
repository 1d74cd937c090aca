"""Latent attention of prompts on a CPU, in C++ (prefill.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    q, blocks = (c_void_p, c_int64, c_int64), (c_void_p, c_void_p, c_int64)
    sequences, rest = (c_void_p, c_void_p), (c_void_p, c_float, c_void_p)
    return function("mla_prefill", c_int, *q, *blocks, *sequences, *rest, *[c_int64] * 7, c_int)


def mla_prefill(
    q_THX: Tensor,
    blocks_MSC: Tensor,
    *,
    block_tables_BN: Tensor,
    context_lens: Sequence[int],
    offsets: Sequence[int],
    up_HXR: Tensor,
    value_dims: int,
    scale: float,
) -> Tensor:
    q_THX = q_THX if q_THX.stride(2) == 1 else q_THX.contiguous()
    (T, H, _), (_, S, C), (_, rows, R), V = q_THX.shape, blocks_MSC.shape, up_HXR.shape, value_dims
    o_THV = q_THX.new_empty(T, H, V)
    starts_B, offsets_B1 = (torch.tensor(list(n), dtype=torch.int64) for n in (context_lens, offsets))
    _run()(
        DTYPES[q_THX.dtype],
        q_THX.data_ptr(),
        q_THX.stride(0),
        q_THX.stride(1),
        blocks_MSC.data_ptr(),
        block_tables_BN.data_ptr(),
        block_tables_BN.stride(0),
        starts_B.data_ptr(),
        offsets_B1.data_ptr(),
        up_HXR.data_ptr(),
        scale,
        o_THV.data_ptr(),
        len(offsets) - 1,
        H,
        rows - V,
        V,
        R,
        C - R,
        S,
        torch.get_num_threads(),
    )
    return o_THV
