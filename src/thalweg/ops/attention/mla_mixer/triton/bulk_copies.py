"""What kernels in Gluon share: dependent launch, bulk copies of tiles of a context, programs that await one another."""

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


@gluon.jit
def arrive_with_results(arrived_ptr):
    """This program's stores and bulk copies to memory are there for whoever awaits the results of all."""
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        fence.proxy.async;
        fence.acq_rel.gpu;
        @p red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [arrived_ptr.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def await_results(arrived_ptr, programs, waiting):
    """Those of `programs` programs. The last of the `waiting` that await them leaves both counts as they were, zero."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.ne.u32 p, t, 0;
        @p bra DONE;
        AGAIN:
        ld.acquire.gpu.global.u32 t, [$1];
        setp.lt.u32 p, t, $2;
        @p bra AGAIN;
        atom.acq_rel.gpu.global.add.u32 t, [$1 + 4], 1;
        add.u32 t, t, 1;
        setp.ne.u32 p, t, $3;
        @p bra DONE;
        st.global.u32 [$1], 0;
        st.global.u32 [$1 + 4], 0;
        DONE:
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [arrived_ptr.to(gl.int64), programs, waiting],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    barrier()
    gl.inline_asm_elementwise("fence.proxy.async; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
