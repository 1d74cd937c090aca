"""Op "experts" over weights in fp8: the reference, the kernels under the interpreter, compiled for Hopper."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.ops.compile_sm90 import Compiled, compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.moe_case import (
    check_left_out,
    experts_in_float64,
    implementation,
    moe_case_fp8,
    rmse_ratio,
    triton_experts,
)
from thalweg.ops.moe.experts import reference
from thalweg.quant import scheme_named

reference_experts = partial(reference.experts, scheme_named("fp8"))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("T", "D", "I", "E", "k", "shared"), [(1, 256, 128, 8, 3, 1), (9, 300, 80, 5, 2, 0)])
def test_reference_is_experts_of_the_widened_weights(
    T: int, D: int, I: int, E: int, k: int, shared: int, published: bool
) -> None:
    case = moe_case_fp8(T, D, I, E, k, shared, torch.float32, published=published)
    assert rmse_ratio(case.run(reference_experts), experts_in_float64(case)) < 1e-5
    case = moe_case_fp8(T, D, I, E, k, shared, torch.bfloat16, published=published)
    assert rmse_ratio(case.run(reference_experts), experts_in_float64(case)) < 0.01


def check(T: int, D: int, I: int, E: int, k: int, shared: int, published: bool = True) -> None:
    case = moe_case_fp8(T, D, I, E, k, shared, torch.float32, published=published)
    assert rmse_ratio(case.run(triton_experts(case)), experts_in_float64(case)) < 1e-5


def check_one_of_each() -> None:
    check(1, 140, 20, 4, 2, 1)  # one pair a program
    check(5, 40, 136, 12, 1, 0)  # a group for each pair
    check(40, 40, 20, 3, 1, 1)  # a group for each expert, some of them with several tiles of tokens
    check(257, 36, 20, 3, 1, 0)  # sorted by expert


def check_more_sizes() -> None:
    check(4, 128, 150, 3, 1, 0, published=False)
    check(6, 144, 136, 12, 2, 1, published=False)
    check(70, 96, 33, 6, 3, 1, published=False)
    check(260, 144, 24, 3, 2, 1, published=False)


def check_grouped() -> None:
    for T, D, I, E, k, shared, published in (
        (70, 96, 33, 6, 3, 1, True),
        (5, 140, 48, 24, 3, 0, True),
        (300, 144, 150, 3, 2, 2, False),
    ):
        case = moe_case_fp8(T, D, I, E, k, shared, torch.float32, published=published)
        assert rmse_ratio(case.run(implementation("grouped", "fp8")), experts_in_float64(case)) < 1e-6


def check_scales_of_any_size() -> None:
    """A weight takes its scale over that of the largest: what matters must come through however they differ."""
    for name in ("pairs", "tiles", "grouped"):
        for scale, dtype in ((1.7e-30, torch.float32), (1e30, torch.float32), (0.6, torch.bfloat16)):
            case = moe_case_fp8(2, 136, 132, 2, 1, 0, dtype, published=True)
            case.gate_up[1][:, :, 0] *= 1e-4
            case.down[1].mul_(scale)
            case.down[1][:, :, 0] *= 3e-3
            case.weights = case.weights / scale
            y = case.run(implementation(name, "fp8"))
            bound = {torch.float32: 1e-5, torch.bfloat16: 0.015 if name == "grouped" else 0.01}[dtype]
            assert rmse_ratio(y, experts_in_float64(case)) < bound


def check_experts_in_bfloat16() -> None:
    for name, T, D, I in (("pairs", 2, 160, 48), ("tiles", 20, 300, 150), ("grouped", 60, 160, 150)):
        for published in (False, True):
            case = moe_case_fp8(T, D, I, 6, 3, 1, torch.bfloat16, published=published)
            case.x[0] *= 2.0**30  # far beyond fp16, which serves products within
            case.x[1] *= 2.0**-30
            y = case.run(implementation(name, "fp8"))
            bound = 0.015 if name == "grouped" else 0.01
            assert all(rmse_ratio(a, b) < bound for a, b in zip(y, experts_in_float64(case), strict=True))


def check_add() -> None:
    for T in (2, 6, 257):
        case = moe_case_fp8(T, 32, 16, 3, 1, 1, torch.float32)
        found, expected = (case.run(op, residual_TD=case.x.flip(0)) for op in (triton_experts(case), reference_experts))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def check_pairs_left_out() -> None:
    for name, T in (("tiles", 5), ("tiles", 2), ("pairs", 2)):  # with a list for each expert, and one for each pair
        case = moe_case_fp8(T, 48, 20, 6, 2, 0, torch.float32)
        check_left_out(case, implementation(name, "fp8"), 1e-5)


def check_nan_stays_in_its_row() -> None:
    for T in (2, 5):
        case = moe_case_fp8(T, 48, 20, 4, 2, 1, torch.float32)
        case.x[1] = torch.nan
        y = case.run(triton_experts(case))
        assert y.isnan().all(1).tolist() == [t == 1 for t in range(T)]
        assert y.isfinite().all(1).tolist() == [t != 1 for t in range(T)]


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_one_of_each, check_pairs_left_out)


@pytest.mark.exhaustive
def test_kernels_under_the_interpreter_at_more_sizes() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_grouped, check_more_sizes, check_experts_in_bfloat16, check_add, check_nan_stays_in_its_row)


@pytest.mark.slow
def test_scales_of_any_size_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_scales_of_any_size)


TYPES = {
    "w_ptr": "*fp8e4nv",
    "ids_ptr": "*i64",
    **dict.fromkeys(("x_ptr", "h_ptr"), "*bf16"),
    **dict.fromkeys(("s_ptr", "y_ptr", "scale_ptr", "x_scale_ptr"), "*fp32"),
    **dict.fromkeys(("expert_ptr", "count_ptr", "list_ptr", "sorted_ptr", "blocks_ptr"), "*i32"),
    **dict.fromkeys(("pairs", "tokens", "groups", "x_stride"), "i32"),
    "ready_ptr": "*fp16",
    "own_x_stride": "i32",
    "own_programs": "i32",
}


OWN = ("own_x_ptr", "own_w_ptr", "own_h_ptr", "own_y_ptr")  # of an own expert, which there is not
NO_OWN = dict(OWN=0, OWN_T=16, OWN_I=32, OWN_D=64)


def compiled(kernel: object, constants: dict[str, object], num_warps: int = 4, **types: str) -> Compiled:
    known = TYPES | types
    names = [p.name for p in kernel.params if not p.is_constexpr]  # type: ignore[attr-defined]
    constants = {name: None for name in names if name in OWN} | constants
    types = {name: known[name] for name in names if name not in constants}
    return compile_sm90(kernel, types, constants, num_warps)


def test_pair_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.pairs import down_pair_kernel, gate_up_pair_kernel

    result = compiled(
        gate_up_pair_kernel, dict(E=257, D=2304, I=1024, K=9, SHARED=1, MASKED=False, BLOCK_I=8, BLOCK_D=128, PDL=True)
    )
    assert result.spilled_bytes == 0
    # "down" reads ids before its wait: "gate_up" must not let it start before its own.
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    result = compiled(
        down_pair_kernel, dict(D=2304, I=1024, MASKED=False, BLOCK_D=16, BLOCK_I=128, PDL=True), num_warps=2
    )
    assert result.spilled_bytes == 0
    assert result.ptx.split("griddepcontrol.wait")[0].count("ld.global.v4.b32") == 2 * 1024 // 128


def test_tile_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.grouping import list_kernel
    from thalweg.ops.moe.experts.triton.tiles import down_tile_kernel, gate_up_tile_kernel

    lists = dict(E=257, D=2304, ORDERED=False, BY_PAIR=False, BLOCK_P=1024, BLOCK_D=4096, PDL=True)
    assert compiled(list_kernel, lists).spilled_bytes == 0
    tiles = NO_OWN | dict(D=2304, I=1024, FOUND=False, BLOCK_T=16, STAGES=4, PDL=True)
    gate_up = tiles | dict(E=257, BY_PAIR=False, BLOCK_P=16, K=9, BLOCK_I=128, BLOCK_D=128)
    result = compiled(gate_up_tile_kernel, gate_up, 8, x_ptr="*fp16")
    assert result.spilled_bytes == 0
    assert result.registers <= 128  # two programs a multiprocessor; shared memory allows no more
    assert 2 * result.shared_bytes <= 227 * 1024
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    result = compiled(down_tile_kernel, tiles | dict(BLOCK_D=256, BLOCK_I=128), 8)
    assert result.spilled_bytes == 0
    assert result.registers <= 128
    assert 2 * result.shared_bytes <= 227 * 1024


def test_grouped_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.grouped import (
        DOWN_TILES,
        GATE_UP_TILES,
        down_grouped_kernel,
        gate_up_grouped_kernel,
    )

    for rows in (64, 128):
        tile = GATE_UP_TILES["fp8", rows]
        constants = dict(D=2304, I=1024, ROWS=rows, TAIL=tile.tail, STAGES=tile.stages)
        blocks = dict(BLOCK_I=tile.columns, BLOCK_D=tile.depth)
        result = compiled(gate_up_grouped_kernel, constants | blocks | dict(K=9), tile.warps, x_ptr="*fp16")
        assert result.spilled_bytes == 0
        assert "wgmma" in result.ptx
        assert 2 * result.shared_bytes <= 227 * 1024
        tile = DOWN_TILES["fp8", rows]
        blocks = dict(BLOCK_D=tile.columns, BLOCK_I=tile.depth)
        result = compiled(down_grouped_kernel, constants | blocks, tile.warps, y_ptr="*bf16")
        assert result.spilled_bytes == 0
        assert "wgmma" in result.ptx
        assert 2 * result.shared_bytes <= 227 * 1024
