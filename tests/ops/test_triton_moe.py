"""Router and expert kernels: the references' additions, the kernels under the interpreter, compiled for Hopper."""

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
    moe_case,
    rmse_ratio,
    routed,
    triton_experts,
)
from thalweg.errors import ConfigError
from thalweg.ops.moe.experts import reference as experts_reference
from thalweg.ops.moe.router import reference
from thalweg.ops.norm.reference import rms_norm
from thalweg.quant import PLAIN


def test_reference_router_norms_and_appends_the_shared_experts() -> None:
    case = moe_case(5, 32, 16, 8, 3, 2, torch.float32)
    normed, weights, ids = routed(reference.norm_router, case, 3, True, 2.5)
    assert torch.equal(normed, rms_norm(case.x, case.norm, 1e-5))
    routed_weights, routed_ids = reference.route(normed @ case.router_weight.T, case.bias, 3, True, 2.5)
    assert ids[:, :3].tolist() == routed_ids.tolist()
    assert ids[:, 3:].tolist() == [[8, 9]] * 5
    torch.testing.assert_close(weights[:, :3], routed_weights)
    assert (weights[:, 3:] == 1).all()


def test_reference_router_weighs_shared_experts_by_their_gate() -> None:
    case = moe_case(5, 32, 16, 8, 3, 2, torch.float32, gated=True)
    normed, weights, ids = routed(reference.norm_router, case, 3, True, 2.5, "softmax")
    gate, case.router_weight = case.router_weight[8], case.router_weight[:8]
    plain = routed(reference.norm_router, case, 3, True, 2.5, "softmax")
    assert torch.equal(normed, plain[0])
    assert torch.equal(ids, plain[2])
    torch.testing.assert_close(weights[:, :3], plain[1][:, :3])
    torch.testing.assert_close(weights[:, 3:], (normed @ gate).sigmoid()[:, None].expand(-1, 2))


def test_reference_experts_with_a_shared_one() -> None:
    case = moe_case(5, 32, 16, 8, 3, 1, torch.float32)
    y = case.run(partial(experts_reference.experts, PLAIN))
    assert rmse_ratio(y, experts_in_float64(case)) < 1e-5


def check_router() -> None:
    from thalweg.ops.moe.router.triton import norm_router, norm_router_by_library

    for op in (norm_router, norm_router_by_library):
        for T, D, E, k, shared, scoring, renormalize in (
            (0, 300, 37, 4, 1, "sigmoid", True),
            (1, 300, 37, 4, 1, "sigmoid", True),
            (5, 256, 64, 8, 0, "softmax", False),
            (19, 100, 64, 3, 2, "sigmoid", True),
        ):
            for gated in (False, True):
                case = moe_case(T, D, 16, E, k, shared, torch.float32, gated=gated)
                both = (routed(f, case, k, renormalize, 2.446, scoring) for f in (op, reference.norm_router))
                for found, expected in zip(*both, strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match="router scoring is 'relu'"):
            routed(op, case, k, scoring="relu")
        for T, E, groups, kept, k in ((3, 64, 8, 4, 8), (5, 36, 3, 1, 4), (2, 40, 20, 5, 2)):
            case = moe_case(T, 64, 16, E, k, 1, torch.float32)
            options = dict(n_group=groups, topk_group=kept)
            both = (routed(f, case, k, **options) for f in (op, reference.norm_router))
            for found, expected in zip(*both, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for T in (8, 19):  # an id out of range would read outside the experts' weights
        case = moe_case(T, 100, 16, 64, 3, 2, torch.float32)
        clean = routed(norm_router, case, 3)
        case.x[3] = torch.nan
        poisoned = routed(norm_router, case, 3)
        assert poisoned[2][3].tolist() == [0, 1, 2, 64, 65]
        others = torch.arange(T) != 3
        assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, poisoned, strict=True))


def check_experts() -> None:
    # One pair a program; a group for each pair; a group for each expert, some of them with several blocks of tokens.
    for T, D, I, E, k, shared in (
        (1, 300, 37, 4, 2, 1),
        (3, 256, 64, 8, 4, 0),
        (5, 100, 48, 24, 3, 1),
        (70, 96, 33, 6, 3, 1),
    ):
        case = moe_case(T, D, I, E, k, shared, torch.float32)
        y = case.run(triton_experts(case))
        assert rmse_ratio(y, experts_in_float64(case)) < 1e-5
        assert y.tolist() == case.run(triton_experts(case), promise=False).tolist()
        check_left_out(case, triton_experts(case), 1e-5)
    check_left_out(moe_case(7, 96, 33, 6, 3, 0, torch.float32), implementation("grouped"), 1e-5)


def check_experts_add() -> None:
    for T, D in ((1, 300), (2, 256), (3, 1), (33, 100), (513, 24), (0, 8)):
        case = moe_case(T, D, 16, 8, 2, 1, torch.float32)
        experts = triton_experts(case)
        total = case.run(experts, residual_TD=case.residual)
        assert torch.equal(total, case.run(experts) + case.residual)
        if T > 2:
            case.x[1] = torch.nan
            others = torch.arange(T) != 1
            assert torch.equal(case.run(experts, residual_TD=case.residual)[others], total[others])


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_router, check_experts, check_experts_add)


TYPES = {
    "x_ptr": "*bf16",
    "w_ptr": "*bf16",
    "h_ptr": "*bf16",
    "y_ptr": "*fp32",
    "out_ptr": "*bf16",
    "bias_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "ids_ptr": "*i64",
    **dict.fromkeys(("expert_ptr", "count_ptr", "list_ptr"), "*i32"),
    "tokens": "i32",
    "split_stride": "i32",
    "row_stride": "i32",
    "T": "i32",
    "residual_ptr": "*bf16",
    "pairs": "i32",
    "residual_stride": "i32",
    "x_stride": "i32",
    "w_stride": "i32",
    "own_x_stride": "i32",
    "own_programs": "i32",
    "own_ptr": "*fp32",
    "scale": "fp32",
    "norm_weight_ptr": "*bf16",
    "normed_ptr": "*bf16",
    "eps": "fp32",
}


def compiled(kernel: object, constants: dict[str, object], num_warps: int = 4) -> Compiled:
    types = {p.name: TYPES[p.name] for p in kernel.params if p.name in TYPES and p.name not in constants}  # type: ignore[attr-defined]
    return compile_sm90(kernel, types, constants, num_warps)


def test_router_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.router.triton import choose_kernel, logits_kernel

    logits = dict(E=256, D=2304, BLOCK_T=16, BLOCK_E=32, BLOCK_D=256, PDL=True)
    assert compiled(logits_kernel, logits).spilled_bytes == 0
    choose = dict(E=256, K=8, SHARED=1, GATED=False, SOFTMAX=False, RENORMALIZE=True, G=1, TOP_G=1, G2=1, S2=256)
    choose |= dict(K2=16, PDL=True)
    for splits, gated in ((1, False), (9, False), (9, True)):
        result = compiled(choose_kernel, choose | dict(SPLITS=splits, GATED=gated), num_warps=1)
        assert result.spilled_bytes == 0
        assert "redux" in result.ptx
    for E, G in ((256, 8), (384, 1), (384, 12)):
        groups = dict(E=E, G=G, TOP_G=4, G2=16 if G == 12 else G, S2=512 if G == 1 else 32, SPLITS=28)
        assert compiled(choose_kernel, choose | groups).spilled_bytes == 0


def test_tile_kernels_compile_for_narrow_experts() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.tiles import down_tile, down_tile_kernel, gate_up_tile, gate_up_tile_kernel

    up, down = (tile(32, 512, torch.bfloat16, "none") for tile in (gate_up_tile, down_tile))
    tiles = dict(OWN=0, OWN_T=16, OWN_I=32, OWN_D=64, D=2048, I=512, FOUND=True, BLOCK_T=16, STAGES=up.stages, PDL=True)
    tiles |= dict.fromkeys(("s_ptr", "own_w_ptr", "own_h_ptr"))
    scan = dict(E=257, K=9, BY_PAIR=False, BLOCK_P=256, x_scale_ptr=None, own_x_ptr=None)
    result = compiled(gate_up_tile_kernel, tiles | scan | dict(BLOCK_I=up.rows, BLOCK_D=up.columns), up.warps)
    assert result.spilled_bytes == 0
    assert 2 * result.shared_bytes <= 227 * 1024
    tiles |= dict(STAGES=down.stages, own_y_ptr=None)
    result = compiled(down_tile_kernel, tiles | dict(BLOCK_D=down.rows, BLOCK_I=down.columns), down.warps)
    assert result.spilled_bytes == 0
    assert result.registers <= 128
    assert 2 * result.shared_bytes <= 227 * 1024


def check_sum_with_norm() -> None:
    """The sum's bits are those without a norm, and the norm is that of the rounded sum."""
    from thalweg.ops.moe.experts.triton.weighted_sum import weighted_sum, weighted_sum_norm
    from thalweg.ops.norm.triton.rms import rms_norm as norm_alone

    for T, D, k, dtype, own, residual in (
        (3, 2304, 9, torch.bfloat16, False, True),
        (2, 96, 3, torch.float32, False, False),
        (2, 1030, 2, torch.bfloat16, True, True),
    ):
        g = torch.Generator().manual_seed(D)
        y_PD, x_TD, own_TD = (torch.randn(n, D + 2, generator=g).to(dtype) for n in (T * k, T, T))
        y_PD, own_TD, x_TD = y_PD[:, :D].contiguous(), own_TD[:, :D].contiguous(), x_TD[:, :D]
        weights, norm = torch.rand(T, k, generator=g), 1 + torch.randn(D, generator=g) * 0.2
        others = (x_TD if residual else None, own_TD if own else None, 2.5)
        alone, out, normed = (torch.full((T, D), torch.nan, dtype=dtype) for _ in range(3))
        weighted_sum(y_PD, weights, alone, *others)
        weighted_sum_norm(y_PD, weights, out, normed, norm, 1e-5, *others)
        assert torch.equal(out, alone)
        expected = norm_alone(out, norm, 1e-5)
        torch.testing.assert_close(normed, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
        assert dtype != torch.bfloat16 or (normed != expected).float().mean() < 0.01  # squares add up otherwise
        narrow, scale, counts = torch.empty(T, D, dtype=torch.float8_e4m3fn), torch.empty(T), torch.arange(1, 12).int()
        weighted_sum_norm(
            y_PD, weights, out, narrow, norm, 1e-5, *others, normed_scale_T=scale, counts_E=(cleared := counts.clone())
        )
        assert torch.equal(out, alone)
        assert not cleared.any()
        # The interpreter truncates to e4m3, which is twice as far off as rounding.
        assert (narrow.float() * scale[:, None] - normed.float()).norm() < 0.1 * normed.float().norm()
        torch.testing.assert_close(scale, normed.float().abs().amax(1) / 448, rtol=2**-7, atol=0)
        weighted_sum(y_PD, weights, out, *others, counts_E=counts)
        assert torch.equal(out, alone)
        assert not counts.any()


def check_experts_tell_the_next_norm() -> None:
    from thalweg.ops.moe.experts.triton import grouped, tiles
    from thalweg.ops.norm import NextNorm

    case = moe_case(5, 64, 32, 4, 2, 1, torch.float32)
    grouped.SLICE = 2  # so that there are several
    next_norm = NextNorm(case.norm, 1e-5)
    y_TD = case.run(grouped.experts_of_groups, next_norm=next_norm)
    assert torch.equal(y_TD, case.run(grouped.experts_of_groups))
    torch.testing.assert_close(next_norm.normed_TD, rms_norm(y_TD, case.norm, 1e-5), rtol=1e-5, atol=1e-6)
    tiles.NORMED = 5
    next_norm = NextNorm(case.norm, 1e-5)
    y_TD = case.run(tiles.experts_of_tiles, next_norm=next_norm)
    assert torch.equal(y_TD, case.run(tiles.experts_of_tiles))
    torch.testing.assert_close(next_norm.normed_TD, rms_norm(y_TD, case.norm, 1e-5), rtol=1e-5, atol=1e-6)
    tiles.NORMED = 6  # of fewer tokens projections have the norm themselves
    next_norm = NextNorm(case.norm, 1e-5)
    case.run(tiles.experts_of_tiles, next_norm=next_norm)
    assert next_norm.normed_TD is None
    grouped.MAX_NORMED = 63
    next_norm = NextNorm(case.norm, 1e-5)
    case.run(grouped.experts_of_groups, next_norm=next_norm)
    assert next_norm.normed_TD is None


def test_the_next_norm_with_the_weighted_sum() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_sum_with_norm, check_experts_tell_the_next_norm)


def test_weighted_sum_with_a_norm_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.weighted_sum import PART, weighted_sum_norm_kernel

    for own in ({"own_ptr": None}, {}):
        none = dict(normed_scale_ptr=None, counts_ptr=None)
        shape = dict(D=2304, K=9, PART=PART, BLOCK_E=1, PDL=True)
        result = compiled(weighted_sum_norm_kernel, shape | none | own, num_warps=8)
        assert result.spilled_bytes == 0


def test_weighted_sum_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.weighted_sum import weighted_sum_kernel

    for block, num_warps in ((256, 2), (1024, 4)):
        for own in ({"own_ptr": None}, {}):
            shape = dict(D=2304, K=9, BLOCK_D=block, BLOCK_E=1, PDL=True, counts_ptr=None)
            result = compiled(weighted_sum_kernel, shape | own, num_warps)
            assert result.spilled_bytes == 0


def test_pair_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.pairs import down_pair_kernel, gate_up_pair_kernel

    gate_up = dict(s_ptr=None, E=257, D=2304, I=1024, K=9, SHARED=1, MASKED=False, BLOCK_I=2, BLOCK_D=512, PDL=True)
    result = compiled(gate_up_pair_kernel, gate_up)
    assert result.spilled_bytes == 0
    # "down" reads ids before its wait: "gate_up" must not let it start before its own.
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    result = compiled(
        down_pair_kernel, dict(s_ptr=None, D=2304, I=1024, MASKED=False, BLOCK_D=16, BLOCK_I=256, PDL=True)
    )
    assert result.spilled_bytes == 0
    assert result.ptx.split("griddepcontrol.wait")[0].count("ld.global.v4.b32") == 16 // 4 * 4


@pytest.mark.parametrize(("by_pair", "block_p"), [(True, 128), (False, 256)])
def test_tile_kernels_compile_for_hopper(by_pair: bool, block_p: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton.tiles import down_tile_kernel, gate_up_tile_kernel

    tiles: dict[str, object] = dict.fromkeys(("s_ptr", "own_w_ptr", "own_h_ptr"))
    tiles |= dict(OWN=0, OWN_T=16, OWN_I=32, OWN_D=64)
    tiles |= dict(D=2304, I=1024, FOUND=True, BLOCK_T=16, STAGES=3, PDL=True)
    scan = dict(E=257, K=9, BY_PAIR=by_pair, BLOCK_P=block_p)
    constants = tiles | scan | dict(x_scale_ptr=None, own_x_ptr=None, BLOCK_I=64, BLOCK_D=128)
    result = compiled(gate_up_tile_kernel, constants)
    assert result.spilled_bytes == 0
    assert result.registers <= 168  # three programs a multiprocessor; shared memory allows no more
    assert 3 * result.shared_bytes <= 227 * 1024
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    result = compiled(down_tile_kernel, tiles | dict(own_y_ptr=None, BLOCK_D=128, BLOCK_I=128))
    assert result.spilled_bytes == 0
    assert result.registers <= 168
    assert 3 * result.shared_bytes <= 227 * 1024
