"""Router and expert kernels: the references' additions, the kernels under the interpreter, compiled for Hopper."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
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
    _, ids = router(case.x, case.router_weight, case.bias, 3, True, 1.0)
    assert sorted(set(ids[3].tolist())) == [0, 1, 2]


def check_router_falls_back_on_groups() -> None:
    from thalweg.ops.moe.triton_router import router

    case = moe_case(3, 64, 16, 16, 4, 0, torch.float32)
    arguments = (case.x, case.router_weight, case.bias, 4, True, 1.0, "sigmoid", 4, 2)
    assert router(*arguments)[1].tolist() == reference.router(*arguments)[1].tolist()


def check_experts() -> None:
    from thalweg.ops.arrivals import arrivals
    from thalweg.ops.moe.triton_experts import experts

    # One pair a program; a group for each pair; a group for each expert, some of them with several blocks of tokens.
    for T, D, I, E, k, shared in (
        (1, 300, 37, 4, 2, 1),
        (3, 256, 64, 8, 4, 0),
        (5, 100, 48, 24, 3, 1),
        (40, 96, 33, 6, 3, 1),
    ):
        case = moe_case(T, D, I, E, k, shared, torch.float32)
        y = experts(case.x, case.weights, case.ids, case.gate_up, case.down, shared)
        assert rmse_ratio(y, experts_in_float64(case)) < 1e-5
        assert y.tolist() == experts(case.x, case.weights, case.ids, case.gate_up, case.down).tolist()
    assert not arrivals(torch.device("cpu")).any()


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_router, check_router_falls_back_on_groups, check_experts)


TYPES = {
    "x_ptr": "*bf16",
    "w_ptr": "*bf16",
    "h_ptr": "*bf16",
    "y_ptr": "*bf16",
    "bias_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "arrivals_ptr": "*i32",
    "weights_ptr": "*fp32",
    "ids_ptr": "*i64",
    "T": "i32",
    "pairs": "i32",
    "x_stride": "i32",
    "w_stride": "i32",
    "scale": "fp32",
}
LAYER = {"E": 257, "D": 2304, "I": 1024, "K": 9}


@pytest.mark.parametrize("tokens", [1, 16])
def test_router_compiles_for_hopper(tokens: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.triton_router import router_kernel

    constants = dict(D=2304, E=256, K=8, SHARED=1, SOFTMAX=False, RENORMALIZE=True, PDL=True)
    constants |= dict(BLOCK_T=16, BLOCK_E=16, BLOCK_D=256, ROWS=tokens, E2=256, K2=16)
    compiled = compile_sm90(router_kernel, types_of(router_kernel), constants)
    assert compiled.spilled_bytes == 0
    assert "atom.global.gpu.acq_rel" in compiled.ptx


def test_pair_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.triton_experts import down_token_kernel, gate_up_pair_kernel

    constants = dict(LAYER, SHARED=1, BLOCK_I=4, BLOCK_D=256, PDL=True)
    assert compile_sm90(gate_up_pair_kernel, types_of(gate_up_pair_kernel), constants).spilled_bytes == 0
    constants = dict(D=2304, I=1024, K=9, BLOCK_D=2, BLOCK_I=512, AHEAD=9, PDL=True)
    compiled = compile_sm90(down_token_kernel, types_of(down_token_kernel), constants)
    assert compiled.spilled_bytes == 0
    assert compiled.ptx.split("griddepcontrol.wait")[0].count("ld.global.v4.b32") == 9 * 2


@pytest.mark.parametrize(("by_pair", "block_p"), [(True, 128), (False, 256)])
def test_expert_kernels_compile_for_hopper(by_pair: bool, block_p: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.triton_experts import down_expert_kernel, gate_up_expert_kernel

    constants = dict(LAYER, BY_PAIR=by_pair, BLOCK_P=block_p, BLOCK_T=16, STAGES=4, PREFETCH=True, PDL=True)
    gate_up = constants | dict(BLOCK_I=32, BLOCK_D=128)
    assert compile_sm90(gate_up_expert_kernel, types_of(gate_up_expert_kernel), gate_up).spilled_bytes == 0
    down = constants | dict(BLOCK_D=64, BLOCK_I=128)
    assert compile_sm90(down_expert_kernel, types_of(down_expert_kernel), down).spilled_bytes == 0


def types_of(kernel: object) -> dict[str, str]:
    return {name: TYPES[name] for name in kernel.arg_names if name in TYPES and not is_constant(kernel, name)}  # type: ignore[attr-defined]


def is_constant(kernel: object, name: str) -> bool:
    return next(p.is_constexpr for p in kernel.params if p.name == name)  # type: ignore[attr-defined]
