"""Kernels beside the library's projections, in Triton: under the interpreter, and compiled for Hopper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.compile_sm90 import Compiled, compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.linear import reference
from thalweg.ops.registry import OpContext, Resolver


def check_ops() -> None:
    from thalweg.ops.linear.triton import linear_add, norm_linear

    g = torch.Generator().manual_seed(0)
    for T, D, O in ((0, 64, 37), (1, 64, 37), (17, 96, 8)):
        x, w = torch.randn(T, D + 5, generator=g)[:, :D], torch.randn(O, D, generator=g) / D**0.5
        norm, residual = 1 + torch.randn(D, generator=g) / 5, torch.randn(T, O, generator=g)
        expected = reference.norm_linear(x, norm, 1e-5, w)
        torch.testing.assert_close(norm_linear(x, norm, 1e-5, w), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(linear_add(x, w, residual.clone()), residual + x @ w.T, rtol=1e-5, atol=1e-4)


def check_few_tokens() -> None:
    from thalweg.ops.linear.triton_few import few_tokens

    g = torch.Generator().manual_seed(0)
    for T, D, O, blocks, split, ahead in ((1, 300, 37, 1, 4, 9), (8, 256, 64, 2, 2, 1), (17, 288, 50, 2, 4, 2)):
        x, w = torch.randn(T, D + 3, generator=g)[:, :D], torch.randn(O, D, generator=g) / D**0.5
        norm, residual = 1 + torch.randn(D, generator=g) / 5, torch.randn(T, O, generator=g)
        y = few_tokens(x, w, residual_TO=residual, blocks=blocks, split=split, ahead=ahead)
        torch.testing.assert_close(y, residual + x @ w.T, rtol=1e-5, atol=1e-5)
        normed, stored = F.rms_norm(x, (D,), norm, 1e-5), torch.full((T, D), torch.nan)
        y = few_tokens(x, w, (norm, 1e-5), normed_TD=stored, blocks=blocks, split=split, ahead=99)
        torch.testing.assert_close(stored, normed, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, normed @ w.T, rtol=1e-5, atol=1e-5)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_ops, check_few_tokens)


def compiled(kernel: object, constants: dict[str, object], num_warps: int) -> Compiled:
    types = {p.name: "*bf16" for p in kernel.params if p.name.endswith("_ptr")}  # type: ignore[attr-defined]
    types |= dict.fromkeys(("O", "x_stride", "w_stride", "residual_stride"), "i32") | {"eps": "fp32"}
    types |= {} if "T" in constants else {"T": "i32"}
    return compile_sm90(kernel, types, constants, num_warps)


@pytest.mark.parametrize(
    ("D", "ahead", "split", "norm", "registers"), [(4096, 16, 4, False, 128), (2304, 9, 8, True, 255)]
)
def test_few_tokens_compiles_for_hopper(D: int, ahead: int, split: int, norm: bool, registers: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.triton_few import few_tokens_kernel

    constants = dict(D=D, TILES=1, BLOCKS=1, SPLIT=split, AHEAD=ahead, NORM=norm, STORE=norm, ADD=not norm, PDL=True)
    result = compiled(few_tokens_kernel, constants, split)
    assert result.spilled_bytes == 0
    assert result.registers <= registers
    # Weights go straight into the registers that the tensor cores read.
    before, after = result.ptx.split("griddepcontrol.wait", 1)
    assert before.count("ld.global.v4.b32") == ahead * (1 + norm)
    assert "ldmatrix" not in after
    assert "shfl" not in after.split("mma.sync")[1]


def test_refuses_with_a_reason() -> None:
    resolver = Resolver()
    resolver.resolve("norm_linear", OpContext("cpu", "float32", {"D": 64, "O": 64}))
    (choice,) = resolver.explain()
    assert choice.chosen == "reference"
    assert ("triton", "needs cuda, not cpu") in choice.refused
