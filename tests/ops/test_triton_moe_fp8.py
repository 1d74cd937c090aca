"""Op "experts_fp8": its reference, the kernels under the interpreter, compiled for Hopper."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import Compiled, compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.moe_case import experts_in_float64, moe_case_fp8, rmse_ratio
from thalweg.ops.moe_fp8 import reference


@pytest.mark.parametrize(("T", "D", "I", "E", "k", "shared"), [(1, 256, 128, 8, 3, 1), (9, 300, 80, 5, 2, 0)])
def test_reference_is_experts_of_the_dequantized_weights(T: int, D: int, I: int, E: int, k: int, shared: int) -> None:
    case, quantized = moe_case_fp8(T, D, I, E, k, shared, torch.float32)
    y = reference.experts_fp8(case.x, case.weights, case.ids, *quantized, shared)
    assert rmse_ratio(y, experts_in_float64(case)) < 1e-5


def check_experts() -> None:
    from thalweg.ops.moe_fp8.triton_experts import experts_fp8

    # One pair a program; a group for each pair; a group for each expert, some of them with several blocks of tokens;
    # more tokens than one pass takes.
    for T, D, I, E, k, shared in (
        (1, 300, 37, 4, 2, 1),
        (2, 128, 150, 4, 2, 0),
        (3, 256, 64, 8, 4, 0),
        (5, 144, 136, 24, 3, 1),
        (70, 96, 33, 6, 3, 1),
        (513, 32, 16, 4, 1, 0),
    ):
        case, quantized = moe_case_fp8(T, D, I, E, k, shared, torch.float32)
        y = experts_fp8(case.x, case.weights, case.ids, *quantized, shared)
        assert rmse_ratio(y, experts_in_float64(case)) < 1e-5


def check_nan_stays_in_its_row() -> None:
    from thalweg.ops.moe_fp8.triton_experts import experts_fp8

    for T in (2, 5):
        case, quantized = moe_case_fp8(T, 144, 48, 6, 3, 1, torch.float32)
        case.x[1] = torch.nan
        y = experts_fp8(case.x, case.weights, case.ids, *quantized, 1)
        assert y.isnan().all(1).tolist() == [t == 1 for t in range(T)]
        assert y.isfinite().all(1).tolist() == [t != 1 for t in range(T)]


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_experts, check_nan_stays_in_its_row)


TYPES = {
    "x_ptr": "*bf16",
    "q_ptr": "*fp8e4nv",
    "s_ptr": "*fp32",
    "h_ptr": "*bf16",
    "y_ptr": "*fp32",
    "ids_ptr": "*i64",
    "pairs": "i32",
    "x_stride": "i32",
}


def compiled(kernel: object, constants: dict[str, object], num_warps: int = 4) -> Compiled:
    types = {p.name: TYPES[p.name] for p in kernel.params if not p.is_constexpr}  # type: ignore[attr-defined]
    return compile_sm90(kernel, types, constants, num_warps)


def test_pair_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe_fp8.triton_experts import down_pair_kernel, gate_up_pair_kernel

    gate_up = dict(E=257, D=2304, I=1024, K=9, SHARED=1, BLOCK_I=4, PDL=True)
    result = compiled(gate_up_pair_kernel, gate_up, num_warps=1)
    assert result.spilled_bytes == 0
    # "down" reads ids before its wait: "gate_up" must not let it start before its own.
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    result = compiled(down_pair_kernel, dict(D=2304, I=1024, BLOCK_D=16, PDL=True))
    assert result.spilled_bytes == 0
    assert result.ptx.split("griddepcontrol.wait")[0].count("ld.global.v4.b32") == 1024 // 128


@pytest.mark.parametrize(("by_pair", "block_p"), [(True, 128), (False, 256)])
def test_expert_kernels_compile_for_hopper(by_pair: bool, block_p: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe_fp8.triton_experts import down_expert_kernel, gate_up_expert_kernel

    tiles = dict(E=257, D=2304, I=1024, BY_PAIR=by_pair, BLOCK_P=block_p, BLOCK_T=16, STAGES=4, PDL=True)
    result = compiled(gate_up_expert_kernel, tiles | dict(K=9, BLOCK_I=64, BLOCK_D=128))
    assert result.spilled_bytes == 0
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    assert compiled(down_expert_kernel, tiles | dict(BLOCK_D=128, BLOCK_I=128)).spilled_bytes == 0
