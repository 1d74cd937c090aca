"""What kernels in Gluon share: dependent launch, and bulk copies of tiles of a context."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the names of Triton 3.7 and of 3.6


@gluon.jit
def gdc_wait():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def gdc_launch_dependents():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def copy(desc, i, j, column, bar, target, pred):
    """desc's box that starts at [i, j, column], into target [rows, columns]; `bar` counts its bytes."""
    box = target._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [i, j, column], bar, box, pred)


@gluon.jit
def first_row(first, length, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where in its block the copy of the tile of token `first` starts: earlier, even below 0, at the context end."""
    return first % BLOCK_SIZE + gl.minimum(length - first, BLOCK_N) - BLOCK_N
