"""Op "experts" over weights in int4: the kernels in Triton under the interpreter, and compiled for Hopper."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from tests.ops.compile_sm90 import Compiled, compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.moe_case import MoeCase, experts_in_float64, implementation, moe_case_int4, rmse_ratio, triton_experts
from thalweg.ops.moe.experts import reference
from thalweg.quant import scheme_named

reference_experts = partial(reference.experts, scheme_named("int4"))


def check(case: MoeCase, *names: str, bound: float = 1e-5) -> None:
    expected = experts_in_float64(case)
    for name in names:
        assert rmse_ratio(case.run(implementation(name, "int4")), expected) < bound, name
        added = case.run(implementation(name, "int4"), residual_TD=case.residual)
        assert rmse_ratio(added, expected + case.residual.double()) < bound, name


def check_kernels() -> None:
    check(moe_case_int4(3, 40, 24, 2, 1, torch.float32, own=16, scale=2.5), "tiles", "grouped")  # a part of a group
    check_order_of_pairs()


def check_order_of_pairs() -> None:
    """A lane has a group's words, nibbles 4 apart as pairs, and the matrix unit two pairs of a lane at a time."""
    from thalweg.ops.moe.experts.triton.nibbles import in_order_of_pairs

    x = torch.randn(3, 384)
    wanted = x.unflatten(-1, (3, 4, 4, 2, 2, 2)).permute(0, 1, 3, 5, 6, 2, 4).flatten(1)
    assert torch.equal(in_order_of_pairs(x[:, :]), wanted)


def check_more_sizes() -> None:
    check(moe_case_int4(5, 136, 40, 6, 1, torch.float32, own=24, scale=2.5), "tiles")
    check(moe_case_int4(1, 264, 136, 4, 2, torch.float32), "tiles", "grouped")
    check(moe_case_int4(40, 96, 40, 6, 3, torch.float32, own=17), "tiles", "grouped")
    check(moe_case_int4(140, 40, 24, 2, 2, torch.float32, scale=2.0, own=40), "tiles", "grouped")
    skewed = moe_case_int4(20, 64, 128, 9, 3, torch.float32, own=16)
    skewed.ids[:] = torch.tensor([8, 0, 3])
    check(skewed, "tiles", "grouped")
    # The interpreter cuts what goes to bf16 off instead of rounding it, twice on the way of a weight.
    check(moe_case_int4(18, 296, 48, 6, 3, torch.bfloat16), "tiles", "grouped", bound=0.03)


def check_no_tokens_and_nan() -> None:
    for name in ("tiles", "grouped"):
        op = implementation(name, "int4")
        assert moe_case_int4(0, 64, 32, 4, 2, torch.float32, own=16).run(op).shape == (0, 64)
        case = moe_case_int4(6, 64, 32, 4, 2, torch.float32, own=16)
        clean = case.run(op)
        case.x[1] = torch.nan
        y = case.run(op)
        assert y[1].isnan().all()
        others = torch.arange(6) != 1
        assert torch.equal(y[others], clean[others])


def check_the_best_implementations() -> None:
    case = moe_case_int4(1, 64, 32, 4, 2, torch.float32, own=16)
    y = case.run(triton_experts(case))
    torch.testing.assert_close(y, case.run(reference_experts), rtol=1e-4, atol=1e-4)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kernels, check_the_best_implementations)


@pytest.mark.exhaustive
def test_kernels_under_the_interpreter_at_more_sizes() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_more_sizes)


@pytest.mark.slow
def test_no_tokens_and_nan_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_no_tokens_and_nan)


TYPES = {
    "w_ptr": "*i32",
    "ids_ptr": "*i64",
    **dict.fromkeys(("x_ptr", "h_ptr", "s_ptr", "own_x_ptr", "own_w_ptr", "own_h_ptr", "ready_ptr"), "*bf16"),
    **dict.fromkeys(("y_ptr", "own_y_ptr"), "*fp32"),
    **dict.fromkeys(("expert_ptr", "count_ptr", "list_ptr", "sorted_ptr", "blocks_ptr"), "*i32"),
    **dict.fromkeys(("pairs", "tokens", "groups", "x_stride", "own_x_stride", "own_programs"), "i32"),
}


def compiled(kernel: object, constants: dict[str, object], num_warps: int = 4, **types: str) -> Compiled:
    known = TYPES | types
    types = {p.name: known[p.name] for p in kernel.params if p.name in known and not p.is_constexpr}  # type: ignore[attr-defined]
    types = {name: type for name, type in types.items() if name not in constants}
    return compile_sm90(kernel, types, constants, num_warps)


def products_with_weights_in_registers_end(ptx: str) -> bool:
    """Whether there are any, and none is under way when the next step overwrites its registers."""
    found, weights, waits = (
        re.finditer(r"wgmma\.mma_async[^;]*;|wgmma\.wait_group\.sync\.aligned (\d+)", ptx),
        False,
        [],
    )
    for match in found:
        if match[1] is None:
            weights = match[0].count("{") == 2  # sums and weights
        elif weights:
            waits.append(match[1])
    return set(waits) == {"0"}


@pytest.mark.parametrize("tokens", [16, 64])
def test_tile_kernels_compile_for_hopper(tokens: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton import tiles
    from thalweg.ops.moe.experts.triton.grouping import list_kernel

    lists = dict(E=384, D=7168, ORDERED=True, BY_PAIR=False, BLOCK_P=1024, BLOCK_D=8192, scale_ptr=None, PDL=True)
    assert compiled(list_kernel, lists).spilled_bytes == 0
    common = dict(D=7168, I=2048, OWN=2048, FOUND=False, BLOCK_T=16, OWN_T=tokens, PDL=True)
    tile, own = tiles.gate_up_tile(tokens, 2048, torch.bfloat16, "int4"), tiles.OWN_GATE_UP
    scan = dict(E=384, BY_PAIR=False, BLOCK_P=16)
    constants = common | scan | dict(K=8, BLOCK_I=tile.rows, BLOCK_D=tile.columns, STAGES=tile.stages, x_scale_ptr=None)
    constants |= dict(OWN_I=own.rows, OWN_D=own.columns)
    result = compiled(tiles.gate_up_tile_kernel, constants, tile.warps)
    assert result.spilled_bytes == 0
    assert products_with_weights_in_registers_end(result.ptx)
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    tile, own = tiles.down_tile(tokens, 2048, torch.bfloat16, "int4"), tiles.OWN_DOWN
    constants = common | dict(BLOCK_D=tile.rows, BLOCK_I=tile.columns, STAGES=tile.stages)
    result = compiled(tiles.down_tile_kernel, constants | dict(OWN_I=own.columns, OWN_D=own.rows), tile.warps)
    assert result.spilled_bytes == 0
    assert products_with_weights_in_registers_end(result.ptx)


@pytest.mark.parametrize("rows", [64, 128])
def test_grouped_kernels_compile_for_hopper(rows: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton import grouped

    tile = grouped.GATE_UP_TILES["int4", rows]
    common = dict(D=7168, I=2048, ROWS=rows, TAIL=tile.tail, STAGES=tile.stages)
    constants = common | dict(K=8, BLOCK_I=tile.columns, BLOCK_D=tile.depth, x_scale_ptr=None)
    result = compiled(grouped.gate_up_grouped_kernel, constants, tile.warps)
    assert result.spilled_bytes == 0
    assert products_with_weights_in_registers_end(result.ptx)
    tile = grouped.DOWN_TILES["int4", rows]
    constants = common | dict(TAIL=tile.tail, STAGES=tile.stages, BLOCK_D=tile.columns, BLOCK_I=tile.depth)
    result = compiled(grouped.down_grouped_kernel, constants, tile.warps, y_ptr="*bf16")
    assert result.spilled_bytes == 0
    assert products_with_weights_in_registers_end(result.ptx)
