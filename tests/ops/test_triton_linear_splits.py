"""Projections of some tokens in one launch: under the interpreter, compiled for Hopper, when they are chosen."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.fp8_linear_case import draw, expected
from tests.ops.interpreted import run_interpreted
from thalweg.ops.linear import NORM_LINEAR, NormLinearDims
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, LINEAR_FP8, NORM_LINEAR_FP8, Fp8LinearDims
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain.counters import counters


def check_products() -> None:
    from thalweg.ops.linear.triton import splits

    whole, parts, wide = (
        splits.Tile(64, 128, 2, 4, 1),
        splits.Tile(64, 128, 2, 4, 3),
        splits.Tile(128, 128, 2, 4, 4),
    )
    for T, D, O, tile in ((1, 128, 40, whole), (37, 512, 200, parts), (20, 1024, 72, wide), (64, 384, 64, None)):
        case = draw(T, D, O, torch.float32)
        plain = case.q_OD.float() * case.scale_OB.repeat_interleave(128, 1)
        out = torch.full((T, O + 5), torch.nan)
        norm = (case.norm_D, 1e-5)
        for residual, normed in ((None, None), (case.residual_TO, norm), (None, norm)):
            wanted = expected(case, residual=residual, norm=normed is not None)
            # The interpreter truncates to e4m3, which is twice as far off as rounding.
            for weight, most in (((case.q_OD, case.scale_OB), 0.08), ((plain, None), 1e-5)):
                y = splits.product(case.x_TD, *weight, residual, out[:, :O], normed, tile)
                assert float((y - wanted).norm() / wanted.norm()) < most
                assert out[:, O:].isnan().all()
        assert not counters("splits", case.x_TD.device, -(-O // (tile.rows if tile else splits.ROWS))).any()


def test_kernel_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_products)


@pytest.mark.parametrize("T", [17, 64])
@pytest.mark.parametrize(
    ("D", "O", "float8", "norm"),
    [(7168, 2112, False, True), (7168, 2112, True, True), (1536, 12288, True, False), (8192, 7168, True, False)],
)
def test_it_compiles_for_hopper(T: int, D: int, O: int, float8: bool, norm: bool) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.linear.triton.splits import splits_kernel, tile_of, tokens_of

    tile = tile_of(D, O, float8, 132)
    types = {"x_ptr": "*bf16", "w_ptr": "*fp8e4nv" if float8 else "*bf16", "residual_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= {"parts_ptr": "*fp32", "squares_ptr": "*fp32", "arrived_ptr": "*i32", "eps": "fp32"}
    types |= dict.fromkeys(("T", "O", "x_stride", "residual_stride", "y_stride"), "i32")
    constants = dict(D=D, SPLITS=tile.splits, BLOCK_O=tile.rows, BLOCK_T=tokens_of(T, float8), BLOCK_D=tile.columns)
    constants |= dict(STAGES=tile.stages, PDL=True)
    for name, there, kind in (("norm_ptr", norm, "*bf16"), ("s_ptr", float8, "*fp32")):
        (types if there else constants)[name] = kind if there else None
    compiled = compile_sm90(splits_kernel, types, constants, tile.warps, tile.stages)
    assert compiled.spilled_bytes == 0
    assert compiled.shared_bytes <= 227 * 1024
    products = re.findall(r"wgmma\.mma_async[^;]*;", compiled.ptx)
    assert products
    # Of x from registers, or both from shared memory. No step goes on while a product still reads what the next one's
    # operands go to.
    assert {product.count("{") for product in products} == {1 if float8 else 2}
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", compiled.ptx)) == {"0"}


def test_what_it_does_not_serve_it_refuses_with_a_reason() -> None:
    resolver = Resolver()
    for op in (LINEAR_FP8, NORM_LINEAR_FP8, LINEAR_ADD_FP8):
        resolver.resolve(op, Where("cuda", "bfloat16"), Fp8LinearDims(D=7168, O=2112, rest=64))
    resolver.resolve(NORM_LINEAR, Where("cuda", "bfloat16"), NormLinearDims(D=2304, parts=(512,)))
    refused = [dict(choice.refused)["splits"] for choice in resolver.explain()]
    assert all("rest" in reason for reason in refused[:3])
    assert "columns" in refused[3]
