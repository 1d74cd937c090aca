"""Router and expert kernels: the references' additions, the kernels under the interpreter, compiled for Hopper."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import Compiled, compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.moe_case import experts_in_float64, moe_case, rmse_ratio
from thalweg.ops.moe import reference


def test_reference_router_appends_the_shared_experts() -> None:
    case = moe_case(5, 32, 16, 8, 3, 2, torch.float32)
    weights, ids = reference.router(case.x, case.router_weight, case.bias, 3, True, 2.5, num_shared=2)
    logits = case.x @ case.router_weight.T
    routed_weights, routed_ids = reference.route(logits, case.bias, 3, True, 2.5)
    assert ids[:, :3].tolist() == routed_ids.tolist()
    assert ids[:, 3:].tolist() == [[8, 9]] * 5
    torch.testing.assert_close(weights[:, :3], routed_weights)
    assert (weights[:, 3:] == 1).all()


def test_reference_experts_with_a_shared_one() -> None:
    case = moe_case(5, 32, 16, 8, 3, 1, torch.float32)
    y = reference.experts(case.x, case.weights, case.ids, case.gate_up, case.down, 1)
    assert rmse_ratio(y, experts_in_float64(case)) < 1e-5


def check_router() -> None:
    from thalweg.ops.moe.triton_router import router

    for T, D, E, k, shared, scoring, renormalize in (
        (1, 300, 37, 4, 1, "sigmoid", True),
        (5, 256, 64, 8, 0, "softmax", False),
        (19, 100, 64, 3, 2, "sigmoid", True),
    ):
        case = moe_case(T, D, 16, E, k, shared, torch.float32)
        arguments = (case.x, case.router_weight, case.bias, k, renormalize, 2.446, scoring, 1, 1, shared)
        weights, ids = router(*arguments)
        expected_weights, expected_ids = reference.router(*arguments)
        assert ids.tolist() == expected_ids.tolist()
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    case.x[3] = torch.nan  # an id out of range would read outside the experts' weights
    _, ids = router(case.x, case.router_weight, case.bias, 3, True, 1.0, num_shared=2)
    assert ids[3].tolist() == [0, 1, 2, 64, 65]


def check_router_falls_back_on_groups() -> None:
    from thalweg.ops.moe.triton_router import router

    case = moe_case(3, 64, 16, 16, 4, 0, torch.float32)
    arguments = (case.x, case.router_weight, case.bias, 4, True, 1.0, "sigmoid", 4, 2)
    assert router(*arguments)[1].tolist() == reference.router(*arguments)[1].tolist()


def check_experts() -> None:
    from thalweg.ops.moe.triton_experts import experts

    # One pair a program; a group for each pair; a group for each expert, some of them with several blocks of tokens.
    for T, D, I, E, k, shared in (
        (1, 300, 37, 4, 2, 1),
        (3, 256, 64, 8, 4, 0),
        (5, 100, 48, 24, 3, 1),
        (70, 96, 33, 6, 3, 1),
    ):
        case = moe_case(T, D, I, E, k, shared, torch.float32)
        y = experts(case.x, case.weights, case.ids, case.gate_up, case.down, shared)
        assert rmse_ratio(y, experts_in_float64(case)) < 1e-5
        assert y.tolist() == experts(case.x, case.weights, case.ids, case.gate_up, case.down).tolist()


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_router, check_router_falls_back_on_groups, check_experts)


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
    "T": "i32",
    "pairs": "i32",
    "x_stride": "i32",
    "w_stride": "i32",
    "scale": "fp32",
}


def compiled(kernel: object, constants: dict[str, object], num_warps: int = 4) -> Compiled:
    types = {p.name: TYPES[p.name] for p in kernel.params if not p.is_constexpr}  # type: ignore[attr-defined]
    return compile_sm90(kernel, types, constants, num_warps)


def test_router_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.triton_router import choose_kernel, logits_kernel

    logits = dict(E=256, D=2304, BLOCK_T=16, BLOCK_E=32, BLOCK_D=256, PDL=True)
    assert compiled(logits_kernel, logits).spilled_bytes == 0
    choose = dict(SPLITS=9, E=256, K=8, SHARED=1, SOFTMAX=False, RENORMALIZE=True, E2=256, K2=16, PDL=True)
    assert compiled(choose_kernel, choose, num_warps=1).spilled_bytes == 0


def test_pair_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.triton_experts import down_pair_kernel, gate_up_pair_kernel, sum_kernel

    gate_up = dict(E=257, D=2304, I=1024, K=9, SHARED=1, BLOCK_I=2, BLOCK_D=512, PDL=True)
    result = compiled(gate_up_pair_kernel, gate_up)
    assert result.spilled_bytes == 0
    # "down" reads ids before its wait: "gate_up" must not let it start before its own.
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    result = compiled(down_pair_kernel, dict(D=2304, I=1024, BLOCK_D=16, BLOCK_I=256, PDL=True))
    assert result.spilled_bytes == 0
    assert result.ptx.split("griddepcontrol.wait")[0].count("ld.global.v4.b32") == 16 // 4 * 4
    assert compiled(sum_kernel, dict(D=2304, K=9, BLOCK_D=256, PDL=True), num_warps=2).spilled_bytes == 0


@pytest.mark.parametrize(("by_pair", "block_p"), [(True, 128), (False, 256)])
def test_expert_kernels_compile_for_hopper(by_pair: bool, block_p: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.triton_experts import down_expert_kernel, gate_up_expert_kernel

    tiles = dict(E=257, D=2304, I=1024, BY_PAIR=by_pair, BLOCK_P=block_p, BLOCK_T=16, STAGES=3, PDL=True)
    result = compiled(gate_up_expert_kernel, tiles | dict(K=9, BLOCK_I=64, BLOCK_D=128))
    assert result.spilled_bytes == 0
    assert result.registers <= 168  # three programs a multiprocessor; shared memory allows no more
    assert 3 * result.shared_bytes <= 227 * 1024
    assert result.ptx.rindex("griddepcontrol.wait") < result.ptx.index("griddepcontrol.launch_dependents")
    assert compiled(down_expert_kernel, tiles | dict(BLOCK_D=128, BLOCK_I=128)).spilled_bytes == 0
