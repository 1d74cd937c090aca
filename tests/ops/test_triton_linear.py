"""Kernels of op "linear" under the interpreter, and compiled for Hopper without one."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.registry import OpContext, Resolver


def check_linear() -> None:
    from thalweg.ops.linear.triton import GEMV_TOKENS, MAX_TOKENS, linear

    g = torch.Generator().manual_seed(0)
    for T in (0, 1, GEMV_TOKENS, GEMV_TOKENS + 1, 17, MAX_TOKENS + 1):
        for D, O in ((64, 37), (300, 40)):
            x, w = torch.randn(T, D + 5, generator=g)[:, :D], torch.randn(O, D, generator=g)
            torch.testing.assert_close(linear(x, w), x @ w.T, rtol=1e-5, atol=1e-4)


def check_long_rows() -> None:
    from thalweg.ops.linear.triton import run_gemv

    x, w, y = torch.randn(2, 1000), torch.randn(5, 1000), torch.full((2, 5), torch.nan)
    run_gemv(x, w, y, ahead=2)  # most of a row is loaded after the wait
    torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-4)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_linear, check_long_rows)


TYPES = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "T": "i32", "O": "i32", "x_stride": "i32"} | {
    "w_stride": "i32"
}


@pytest.mark.parametrize(("T", "D"), [(1, 2304), (4, 4096), (1, 9216)])
def test_gemv_compiles_for_hopper(T: int, D: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.triton import gemv_kernel

    types = {name: kind for name, kind in TYPES.items() if name != "T"}
    constants = dict(D=D, T=T, BLOCK_O=4, BLOCK_D=256, AHEAD=min(36, D // 256), PDL=True)
    compiled = compile_sm90(gemv_kernel, types, constants)
    assert compiled.spilled_bytes == 0
    # The weights are asked for before the wait, 16 bytes a thread, and x after it.
    before, after = compiled.ptx.split("griddepcontrol.wait", 1)
    assert before.count("ld.global.v4.b32") >= D // 256
    assert after.count("ld.global.v4.b32") >= D // 256


@pytest.mark.parametrize("tokens", [16, 64])
def test_tiles_compile_for_hopper(tokens: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.triton import tiles_kernel

    constants = dict(D=2304, BLOCK_T=tokens, BLOCK_O=16, BLOCK_D=128, STAGES=4, PREFETCH=True, SWAP=False, PDL=True)
    compiled = compile_sm90(tiles_kernel, TYPES, constants)
    assert compiled.spilled_bytes == 0
    assert "cp.async.bulk.prefetch.L2" in compiled.ptx
    assert "griddepcontrol.wait" in compiled.ptx


def test_refuses_with_a_reason() -> None:
    resolver = Resolver()
    resolver.resolve("linear", OpContext("cpu", "float32", {"D": 64, "O": 64}))
    (choice,) = resolver.explain()
    assert choice.chosen == "reference"
    assert choice.refused[0] == ("triton", "needs cuda, not cpu")
