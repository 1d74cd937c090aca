"""Kernels of op "linear" under the interpreter, and compiled for Hopper without one."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.registry import OpContext, Resolver


def check_linear() -> None:
    from thalweg.ops.linear.triton import MAX_TOKENS, linear

    g = torch.Generator().manual_seed(0)
    # Part of a chunk, some chunks, more chunks than are in flight, and long rows.
    for T, D, O in ((0, 64, 37), (1, 64, 37), (2, 300, 40), (1, 2600, 5), (2, 8200, 3), (MAX_TOKENS + 1, 300, 37)):
        x, w = torch.randn(T, D + 5, generator=g)[:, :D], torch.randn(O, D, generator=g)
        torch.testing.assert_close(linear(x, w), x @ w.T, rtol=1e-5, atol=1e-3)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_linear)


TYPES = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "O": "i32", "x_stride": "i32", "w_stride": "i32"}


@pytest.mark.parametrize(("T", "D", "block", "depth"), [(1, 2304, 4, 256), (2, 4096, 4, 256), (1, 9216, 2, 1024)])
def test_gemv_compiles_for_hopper(T: int, D: int, block: int, depth: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.triton import gemv_kernel

    constants = dict(D=D, T=T, BLOCK_O=block, BLOCK_D=depth, AHEAD=9, PDL=True)
    compiled = compile_sm90(gemv_kernel, TYPES, constants, num_warps=2 if depth == 256 else 4)
    assert compiled.spilled_bytes == 0
    # The weights are asked for before the wait, 16 bytes a thread, and x after it.
    before, after = compiled.ptx.split("griddepcontrol.wait", 1)
    assert before.count("ld.global.v4.b32") == 9 * 2
    assert after.count("ld.global.v4.b32") == (D // depth - 9) * 2 + T * D // depth * 2


def test_refuses_with_a_reason() -> None:
    resolver = Resolver()
    resolver.resolve("linear", OpContext("cpu", "float32", {"D": 64, "O": 64}))
    (choice,) = resolver.explain()
    assert choice.chosen == "reference"
    assert choice.refused[0] == ("triton", "needs cuda, not cpu")
