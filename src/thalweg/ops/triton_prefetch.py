"""Weights brought into the L2 cache ahead of time, asked for by small kernels that leave the memory idle."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.triton_dot import INTERPRETED

SMALLEST, LARGEST = 16, 16 << 10  # bytes a thread asks for


@triton.jit
def prefetch(ptr: tl.tensor, program: tl.tensor, BYTES: tl.constexpr, WARPS: tl.constexpr) -> None:
    """Program `program`'s share of what is at ptr: BYTES for each of its threads. Nothing is waited for."""
    if BYTES > 0 and not INTERPRETED:
        thread = program * (32 * WARPS) + tl.arange(0, 32 * WARPS)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,n",
            [ptr.to(tl.int64) + thread.to(tl.int64) * BYTES, BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def bytes_a_thread(ahead: Tensor | None, programs: int, warps: int, most: int) -> int:
    """Of `ahead`'s first `most` bytes, what each thread of a launch has to ask for, in the units the hardware knows."""
    if ahead is None or not ahead.is_cuda:
        return 0
    share = min(most, ahead.numel() * ahead.element_size()) // (programs * warps * 32)
    return min(LARGEST, share // SMALLEST * SMALLEST)
