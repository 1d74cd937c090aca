"""Products with float8 in Triton: under the interpreter, compiled for Hopper, and when they are chosen. In bf16, where
weights are widened by moving their bits, results are in test_gpu_linear_fp8."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.fp8_linear_case import draw, expected
from tests.ops.interpreted import run_interpreted
from thalweg.ops.linear.fp8 import (
    LINEAR_ADD_FP8,
    LINEAR_FP8,
    NORM_LINEAR_FP8,
    Fp8LinearDims,
)
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain import cuda_build, triton_support


def check_products() -> None:
    from thalweg.ops.linear.fp8 import triton

    parts = triton.Tile(64, 16, 128, 2, 4, splits=3, group=2)
    fold = triton.Tile(32, 64, 64, 2, 4, fold=True, group=2)
    shapes = (
        (1, 128, 40, None),
        (37, 512, 200, parts),
        (9, 64, 72, None),
        (150, 2432, 72, fold),
        (300, 256, 130, None),
    )
    for T, D, O, tile in shapes:
        case = draw(T, D, O, torch.float32)
        out = torch.full((T, O + 5), torch.nan)
        for residual, norm in ((None, None), (case.residual_TO, (case.norm_D, 1e-5))):
            y = triton.product(case.x_TD, case.q_OD, case.scale_OB, residual, out[:, :O], norm, tile)
            wanted = expected(case, residual=residual, norm=norm is not None)
            assert float((y - wanted).norm() / wanted.norm()) < 5e-4  # x is fp16 there, which is less than these
            assert out[:, O:].isnan().all()


def check_ops() -> None:
    from thalweg.ops.linear.fp8 import triton

    for T in (0, 1, 17):
        case = draw(T, 128, 24, torch.float32, rest=3)
        weight = (case.q_OD, case.scale_OB)
        near = {"rtol": 1e-2, "atol": 1e-2}
        y = triton.linear_fp8(case.x_TD, *weight, case.rest_RD)
        torch.testing.assert_close(y.double(), expected(case, rest=True), **near)
        y = triton.norm_linear_fp8(case.x_TD, case.norm_D, 1e-5, *weight, case.rest_RD)
        torch.testing.assert_close(y.double(), expected(case, rest=True, norm=True), **near)
        y = triton.norm_linear_fp8(case.x_TD, case.norm_D, 1e-5, *weight)
        torch.testing.assert_close(y.double(), expected(case, norm=True), **near)
        y = triton.linear_add_fp8(case.x_TD, *weight, case.residual_TO)
        torch.testing.assert_close(y.double(), expected(case, residual=case.residual_TO), **near)


def check_scales_far_apart() -> None:
    from thalweg.ops.linear.fp8 import triton

    case = draw(70, 256, 40, torch.float32)
    scales = case.scale_OB * torch.logspace(-30, 8, 40)[:, None]
    for tile in (None, triton.Tile(32, 64, 64, 2, 4, fold=True)):
        y = triton.product(case.x_TD, case.q_OD, scales, tile=tile).double()
        wanted = case.x_TD.double() @ (case.q_OD.double() * scales.double().repeat_interleave(128, 1)).T
        assert ((y - wanted).norm(dim=0) / wanted.norm(dim=0)).max() < 1e-3  # row by row of the weight


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_products, check_ops, check_scales_far_apart)


@pytest.mark.parametrize("T", [1, 32, 64, 256, 1024, 8192])
@pytest.mark.parametrize(("D", "O"), [(7168, 2112), (64, 2048)])
def test_they_compile_for_hopper_with_weights_in_registers(T: int, D: int, O: int) -> None:
    """And without spills: what is widened does not go by way of shared memory."""
    pytest.importorskip("triton")
    from thalweg.ops.linear.fp8.triton import tile_of, tiles_kernel

    tile = tile_of(T, D, O, 132)
    types = {"x_ptr": "*fp16", "q_ptr": "*fp8e4nv", "residual_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("x_scale_ptr", "s_ptr", "largest_ptr"), "*fp32")
    types |= dict.fromkeys(("T", "D", "O", "residual_stride", "y_stride"), "i32")
    constants = dict(BLOCK_O=tile.rows, BLOCK_T=tile.tokens, BLOCK_D=tile.columns, FOLD=tile.fold, GROUP=tile.group)
    compiled = compile_sm90(
        tiles_kernel, types, constants | dict(STAGES=tile.stages, PDL=True), tile.warps, tile.stages
    )
    assert compiled.spilled_bytes == 0
    products = re.findall(r"wgmma\.mma_async[^;]*;", compiled.ptx)
    assert products
    assert all(product.count("{") == 2 for product in products)  # sums and weights
    # No step goes on while a product still reads the registers that the next one's weights go to.
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", compiled.ptx)) == {"0"}


def test_half_kernel_compiles_for_the_widest_rows() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.fp8.triton import half_kernel

    types = {"x_ptr": "*bf16", "norm_ptr": "*bf16", "half_ptr": "*fp16", "eps": "fp32"}
    types |= dict.fromkeys(("x_scale_ptr", "s_ptr", "largest_ptr"), "*fp32") | dict.fromkeys(
        ("T", "O", "x_stride"), "i32"
    )
    constants = {"D": 18432, "BLOCK_D": 32768, "ROWS": 32, "PDL": True}
    assert compile_sm90(half_kernel, types, constants, num_warps=8).spilled_bytes == 0


def test_parts_are_summed_in_registers() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.fp8.triton import sum_kernel

    types = {"parts_ptr": "*fp32", "residual_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("T", "O", "residual_stride", "y_stride"), "i32")
    assert compile_sm90(sum_kernel, types, {"SPLITS": 8, "BLOCK_O": 512, "PDL": True}).spilled_bytes == 0


@pytest.mark.parametrize("op", [LINEAR_FP8, NORM_LINEAR_FP8, LINEAR_ADD_FP8], ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("D", "O", "table"),
    [
        (7168, 2112, {"1-16": "cuda", "17-64": "splits", "65-128": "matrix", "129-": "w8a8"}),
        (12288, 4096, {"1-16": "cuda", "17-128": "matrix", "129-": "w8a8"}),
        (2048, 9216, {"1-16": "cuda", "17-128": "matrix", "129-": "w8a8"}),
        (7168, 36864, {"1-16": "cuda", "17-64": "triton", "65-": "w8a8"}),
        (7168, 2113, {"any": "triton"}),
        (4352, 5120, {"1-16": "triton", "17-128": "matrix", "129-": "w8a8"}),
        (64, 2048, {"any": "triton"}),
        (200, 2048, {"any": "reference"}),
    ],
)
def test_who_serves(op: object, D: int, O: int, table: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_support, "_compute_capability_major", lambda: 9)
    monkeypatch.setattr(cuda_build, "why_not", lambda where: None)
    resolver = Resolver()
    resolver.resolve(op, Where("cuda", "bfloat16"), Fp8LinearDims(D=D, O=O))  # type: ignore[arg-type]
    assert {str(span.tokens): span.name for span in resolver.explain()[0].table} == table


@pytest.mark.parametrize(
    ("D", "O", "dtype", "name", "reason"),
    [
        (200, 64, "bfloat16", "triton", "needs D to be a multiple of 64, not 200"),
        (256, 64, "float32", "triton", "needs bfloat16, not float32"),
        (192, 64, "bfloat16", "cuda", "needs D to be a multiple of 128, beyond 4096 of 512, not 192"),
        (4352, 64, "bfloat16", "cuda", "needs D to be a multiple of 128, beyond 4096 of 512, not 4352"),
        (256, 63, "bfloat16", "cuda", "needs O to be a multiple of 8 up to 262144, not 63"),
    ],
)
def test_what_they_do_not_serve_they_refuse_with_a_reason(D: int, O: int, dtype: str, name: str, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(LINEAR_FP8, Where("cuda", dtype), Fp8LinearDims(D=D, O=O))
    assert dict(resolver.explain()[0].refused)[name] == reason
