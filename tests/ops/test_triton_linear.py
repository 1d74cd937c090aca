"""Kernels of op "linear" under the interpreter, and compiled for Hopper without one."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.registry import OpContext, Resolver


def check_linear() -> None:
    from thalweg.ops.linear.triton import linear

    g = torch.Generator().manual_seed(0)
    for T, D, O in ((0, 64, 37), (1, 64, 37), (2, 300, 40), (4, 300, 37), (5, 300, 37), (7, 1600, 20), (20, 1600, 20)):
        x, w = torch.randn(T, D + 5, generator=g)[:, :D], torch.randn(O, D, generator=g)
        torch.testing.assert_close(linear(x, w), x @ w.T, rtol=1e-5, atol=1e-4)


def check_variants() -> None:
    from thalweg.ops.linear.triton import run_gemv, run_tiles

    x, w = torch.randn(3, 1000), torch.randn(70, 1000)
    for run, options in (
        (run_gemv, dict(ahead=2)),  # most of a row is loaded after the wait
        (run_gemv, dict(warps=1)),
        (run_tiles, dict(early=False)),
        (run_tiles, dict(splits=3)),
    ):
        y = torch.full((3, 70), torch.nan)
        run(x, w, y, **options)
        torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-4)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_linear, check_variants)


TYPES = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "O": "i32", "x_stride": "i32", "w_stride": "i32"}


@pytest.mark.parametrize(("T", "D", "block", "depth"), [(1, 2304, 4, 256), (4, 2304, 4, 256), (1, 9216, 2, 1024)])
def test_gemv_compiles_for_hopper(T: int, D: int, block: int, depth: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.triton import gemv_kernel

    constants = dict(D=D, T=T, BLOCK_O=block, BLOCK_D=depth, AHEAD=9, SHARE_X=False, PDL=True)
    compiled = compile_sm90(gemv_kernel, TYPES, constants, num_warps=2 if depth == 256 else 4)
    assert compiled.spilled_bytes == 0
    # The weights are asked for before the wait, 16 bytes a thread, and x after it.
    before, after = compiled.ptx.split("griddepcontrol.wait", 1)
    assert before.count("ld.global.v4.b32") == 9 * 2
    assert after.count("ld.global.v4.b32") == T * D // depth * 2


@pytest.mark.parametrize(("tokens", "splits"), [(16, 6), (64, 3), (64, 1)])
def test_tiles_compile_for_hopper(tokens: int, splits: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.triton import tiles_kernel

    types = TYPES | {"T": "i32", "partial_ptr": "*fp32", "arrivals_ptr": "*i32"}
    constants = dict(D=4096, SPLITS=splits, BLOCK_T=tokens, BLOCK_O=64, BLOCK_D=128, STAGES=3, EARLY=True, PDL=True)
    compiled = compile_sm90(tiles_kernel, types, constants)
    assert compiled.spilled_bytes == 0
    assert "wgmma" in compiled.ptx
    assert "griddepcontrol.wait" in compiled.ptx


def test_refuses_with_a_reason() -> None:
    resolver = Resolver()
    resolver.resolve("linear", OpContext("cpu", "float32", {"D": 64, "O": 64}))
    (choice,) = resolver.explain()
    assert choice.chosen == "reference"
    assert choice.refused[0] == ("triton", "needs cuda, not cpu")
