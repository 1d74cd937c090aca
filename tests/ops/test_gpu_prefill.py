"""Kernels of a prefill on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops.moe_case import experts_in_float64, moe_case, rmse_ratio, routed
from tests.ops.prefill_case import KdaCase, conv_boundaries, conv_case, kda_boundaries, mla_case, ratio

pytestmark = pytest.mark.gpu

LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 1000, 0)
DTYPES = [(torch.bfloat16, 0.005), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("H", "K", "V"), [(4, 128, 128), (2, 32, 24)])
@pytest.mark.parametrize("fresh", [False, True])
def test_kda_of_mixed_lengths(dtype: torch.dtype, tolerance: float, H: int, K: int, V: int, fresh: bool) -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    case = KdaCase(LENGTHS, H, K, V, dtype, "cuda", fresh=fresh)
    case.check(case.run(kda_prefill), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("gate", [-30.0, -8.0, 8.0, 30.0])
def test_kda_of_extreme_gates(dtype: torch.dtype, tolerance: float, gate: float) -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    case = KdaCase((130,), 4, 128, 128, dtype, "cuda", gate=gate)
    case.check(case.run(kda_prefill), tolerance)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_kda_of_equal_keys(value: float) -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    case = KdaCase((130,), 4, 128, 128, torch.bfloat16, "cuda", gate=-30.0)
    case.k = torch.full_like(case.k, value)
    case.check(case.run(kda_prefill), 0.01)


def test_kda_with_a_bfloat16_state() -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    case = KdaCase((65, 3), 4, 128, 128, torch.bfloat16, "cuda", state_dtype=torch.bfloat16)
    case.check(case.run(kda_prefill), 0.005, state_tolerance=0.007)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_at_boundaries_are_those_of_calls_that_end_there(dtype: torch.dtype) -> None:
    from thalweg.ops.delta.conv1d.triton import conv1d_prefill
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    kda_boundaries(kda_prefill, "cuda", dtype, H=4, K=128)
    conv_boundaries(conv1d_prefill, "cuda", dtype, C=1100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_conv1d(dtype: torch.dtype) -> None:
    from thalweg.ops.delta.conv1d import reference, triton

    x, state, *rest = conv_case((0, 1, 2, 3, 40, 0, 333), 3 * 512, 3, dtype, "cuda")
    expected_state = state.clone()
    expected = reference.conv1d_prefill(x, expected_state, *rest)
    assert ratio(triton.conv1d_prefill(x, state, *rest), expected) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert torch.equal(state.nan_to_num(7), expected_state.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gate_norm_and_activation(dtype: torch.dtype) -> None:
    from thalweg.ops.activation import reference as activation
    from thalweg.ops.activation.triton import silu_and_mul
    from thalweg.ops.delta.kda import reference as kda
    from thalweg.ops.delta.kda.triton.gate import kda_gate
    from thalweg.ops.norm import reference as norm
    from thalweg.ops.norm.triton.gated import gated_rms_norm

    bound = 1e-6 if dtype == torch.float32 else 2e-3
    wide = torch.randn(300, 2, 4, 128, device="cuda").to(dtype)
    f, gate, A_log, dt_bias = wide[:, 0], wide[:, 1], torch.randn(4).cuda(), torch.randn(4, 128).cuda()
    assert ratio(kda_gate(f, A_log, dt_bias), kda.kda_gate(f, A_log, dt_bias)) < 1e-6
    o, weight = torch.randn(300, 4, 128, device="cuda").to(dtype), torch.randn(128, device="cuda").to(dtype)
    for silu in (False, True):
        expected = norm.gated_rms_norm(o, gate, weight, 1e-5, silu=silu)
        assert ratio(gated_rms_norm(o, gate, weight, 1e-5, silu=silu), expected) < bound
    x = wide.flatten(1)
    assert ratio(silu_and_mul(x), activation.silu_and_mul(x)) < bound


def mla_of(form: str) -> Callable[..., torch.Tensor]:
    if form == "triton":
        from thalweg.ops.attention.mla.triton.prefill import mla_prefill
    else:
        from thalweg.ops.attention.mla.cuda import mla_prefill
    return mla_prefill


@pytest.mark.parametrize("form", ["triton", "cuda"])
@pytest.mark.parametrize("most", [16384, 300])
@pytest.mark.parametrize(("cached", "new"), [([0], [1000]), ([0, 65, 0, 700, 0], [1, 64, 0, 130, 300]), ([1000], [7])])
def test_mla(form: str, most: int, cached: list[int], new: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.ops.attention.mla import expanded, reference

    monkeypatch.setattr(expanded, "MAX_CONTEXT", most)
    shape = dict(H=4, K=128, P=64, V=128, R=512, block_size=64)
    arguments = mla_case(cached, new, torch.bfloat16, "cuda", **shape)
    assert ratio(mla_of(form)(**arguments), reference.mla_prefill(**arguments)) < 0.006


@pytest.mark.parametrize("form", ["triton", "cuda"])
@pytest.mark.parametrize("H", [64, 32, 16, 8])
def test_mla_of_kimi_k2_over_1_to_8_ranks(H: int, form: str) -> None:
    from thalweg.ops.attention.mla import reference

    shape = dict(H=H, K=128, P=64, V=128, R=512, block_size=64)
    arguments = mla_case([0, 65, 0, 700], [1, 64, 0, 130], torch.bfloat16, "cuda", **shape)
    assert ratio(mla_of(form)(**arguments), reference.mla_prefill(**arguments)) < 0.006


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (300, 72, 40, 3, 0), (256, 64, 4, 2, 1)]
)
@pytest.mark.parametrize("T", [520, 2000])
def test_experts(T: int, dtype: torch.dtype, tolerance: float, D: int, I: int, E: int, k: int, shared: int) -> None:
    from thalweg.ops.moe.experts.triton.grouped import experts_of_groups

    case = moe_case(T, D, I, E, k, shared, dtype, "cuda", seed=T)
    y = case.run(experts_of_groups)
    assert rmse_ratio(y, experts_in_float64(case)) < tolerance
    assert torch.equal(y, case.run(experts_of_groups, promise=False))


@pytest.mark.parametrize(("dtype", "shared"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_router_of_many_tokens(dtype: torch.dtype, shared: int) -> None:
    from thalweg.ops.moe.router import reference
    from thalweg.ops.moe.router.triton import norm_router_by_library
    from thalweg.ops.norm.reference import rms_norm

    case = moe_case(1000, 256, 16, 64, 8, shared, dtype, "cuda")
    normed, weights, ids = routed(norm_router_by_library, case, 8, True, 2.446)
    assert ratio(normed, rms_norm(case.x, case.norm, 1e-5)) < 1e-2
    # Of the rows as they were normed, so that a last bit of a norm does not pass for another choice.
    plain = torch.nn.functional.linear(normed.float(), case.router_weight.float())
    expected, expected_ids = reference.route(plain, case.bias, 8, True, 2.446)
    assert (ids[:, 8:] == 64).all()
    weights, ids = weights[:, :8], ids[:, :8]
    assert (ids == expected_ids).float().mean() > 0.999
    assert ratio(weights, expected) < 1e-3
