"""Programmatic dependent launch for Triton kernels: a kernel starts while the one ahead drains, and waits in mid-air.

The rules of a kernel with the constexpr PDL: it executes gdc_wait, always; before that it reads only weights and
writes nothing; what it does early is bounded by what the launch ahead leaves free.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def pdl_options(tensor: Tensor) -> dict[str, Any]:
    """Launch options for a kernel with the constexpr PDL; off on the CPU, where only the interpreter runs kernels."""
    return {"PDL": True, "launch_pdl": True} if tensor.is_cuda else {"PDL": False}


@triton.jit
def prefetch_l2(pointer, num_bytes):
    """Ask for num_bytes (a multiple of 16) from `pointer` (aligned to 16) to be brought into L2; one thread asks."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [pointer.to(tl.int64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
