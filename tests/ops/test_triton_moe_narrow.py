"""Op "experts" over weights in fp8 with activations in fp8, for a batch of tokens: under the interpreter, compiled for
Hopper."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.moe_case import experts_in_float64, implementation, moe_case_fp8, rmse_ratio


def check_experts() -> None:
    for T, D, I, E, k, shared in ((5, 256, 128, 12, 1, 0), (40, 128, 256, 3, 1, 1), (20, 384, 128, 24, 3, 1)):
        case = moe_case_fp8(T, D, I, E, k, shared, torch.bfloat16, published=True)
        case.x[0] *= 2.0**30
        case.x[-1] *= 2.0**-30
        for name in ("tiles_w8a8", "joined_w8a8"):
            y = case.run(implementation(name, "fp8"))
            # The interpreter truncates to e4m3, which is twice as far off as rounding.
            off = [rmse_ratio(a, b) for a, b in zip(y, experts_in_float64(case), strict=True)]
            assert max(off) < 0.25
            assert sum(off) / T < 0.12


def test_experts() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_experts, check_lists_and_scales_of_a_router)


def check_lists_and_scales_of_a_router() -> None:
    """Pairs in any order, scales of 128 columns, and the norm behind the sum."""
    from thalweg.ops.moe.experts.triton import narrow
    from thalweg.ops.moe.experts.triton.grouping import Lists
    from thalweg.ops.norm import NextNorm
    from thalweg.ops.norm.reference import rms_norm

    T, D, I, E, k = 20, 384, 128, 24, 3
    case = moe_case_fp8(T, D, I, E, k, 1, torch.bfloat16, published=True)
    case.x[0] *= 8
    blocks = case.x.float().view(T, -1, 128)
    scales = blocks.abs().amax(2) / 448
    x = (blocks / scales[:, :, None]).to(torch.float8_e4m3fn).view(T, D)
    pairs = case.ids.flatten()
    experts = len(case.down[0])
    lists = torch.full((experts, T), -1, dtype=torch.int32)
    counts = torch.zeros(experts, dtype=torch.int32)
    for pair in torch.randperm(len(pairs)).tolist():
        g = experts - 1 - int(pairs[pair])
        lists[g, counts[g]] = pair
        counts[g] += 1
    order = torch.arange(experts - 1, -1, -1, dtype=torch.int32)
    y_PD = narrow.outputs(x, scales, Lists(order, counts, lists), case.ids.shape[1], case.gate_up, case.down)
    next_norm = NextNorm(case.norm, 1e-5, wants_float8=True)
    y = narrow.summed(y_PD, case.weights, case.x, None, next_norm, counts)
    off = [rmse_ratio(a, b) for a, b in zip(y, experts_in_float64(case), strict=True)]
    assert max(off) < 0.25
    assert sum(off) / T < 0.12
    assert not counts.any()
    assert next_norm.normed_TD is None
    assert next_norm.in_float8 is not None
    q, scale = next_norm.in_float8
    assert rmse_ratio(q.float() * scale[:, None], rms_norm(y, case.norm, 1e-5)) < 0.1


TYPES = {
    **dict.fromkeys(("x_ptr", "w_ptr", "h_ptr"), "*fp8e4nv"),
    **dict.fromkeys(("x_scale_ptr", "s_ptr", "h_scale_ptr", "y_ptr"), "*fp32"),
    **dict.fromkeys(("expert_ptr", "count_ptr", "list_ptr"), "*i32"),
    "tokens": "i32",
}


@pytest.mark.parametrize("tokens", [32, 128])
def test_kernels_compile_for_hopper(tokens: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton import narrow, narrow_kernels

    up, down = narrow.tiles(tokens, 512)
    common = dict(D=2048, I=512, PDL=True)
    for kernel, tile, constants in (
        (narrow_kernels.narrow_gate_up_kernel, up, dict(K=9, BLOCK_I=up.rows, X_BLOCKS=False)),
        (narrow_kernels.narrow_gate_up_kernel, up, dict(K=9, BLOCK_I=up.rows, X_BLOCKS=True)),
        (narrow_kernels.narrow_down_kernel, down, dict(GROUP=up.rows, BLOCK_D=down.rows)),
    ):
        types = {p.name: TYPES[p.name] for p in kernel.params if not p.is_constexpr}
        constants |= common | dict(WIDE=tile.wide, STAGES=tile.stages)
        result = compile_sm90(kernel, types, constants, tile.warps, tile.stages)
        assert "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3" in result.ptx
        assert result.spilled_bytes == 0
        assert 2 * result.shared_bytes <= 227 * 1024
        assert 2 * 32 * tile.warps * result.registers <= 65536  # two programs per multiprocessor


def test_two_launches_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton import joined

    types = {**TYPES, **dict.fromkeys(("x_ptr", "y_ptr", "residual_ptr"), "*bf16"), "ids_ptr": "*i64"}
    types |= {**dict.fromkeys(("parts_ptr", "weights_ptr"), "*fp32"), "arrived_ptr": "*i32"}
    types |= dict.fromkeys(("pairs", "x_stride", "residual_stride"), "i32")
    common = dict(D=7168, I=2048, K=9, WIDE=16, PDL=True)
    up, down = joined.GATE_UP, joined.DOWN
    for kernel, tile, constants in (
        (joined.joined_gate_up_kernel, up, dict(E=385, BY_PAIR=False, BLOCK_P=256, BLOCK_I=up.rows)),
        (joined.joined_down_kernel, down, dict(GROUP=up.rows, BLOCK_D=down.rows)),
    ):
        used = {p.name: types[p.name] for p in kernel.params if not p.is_constexpr}
        result = compile_sm90(kernel, used, constants | common | dict(STAGES=tile.stages), tile.warps, tile.stages)
        assert "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3" in result.ptx
        assert result.spilled_bytes == 0
        assert 2 * result.shared_bytes <= 227 * 1024
        assert 2 * 32 * tile.warps * result.registers <= 65536  # two programs per multiprocessor
