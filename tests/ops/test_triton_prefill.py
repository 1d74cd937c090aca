"""Kernels of a prefill: under the interpreter against the references, and compiled for Hopper."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.ops.compile_sm90 import Compiled, compile_sm90
from tests.ops.gdn_case import GdnShape, PrefillCase
from tests.ops.interpreted import run_interpreted
from tests.ops.moe_case import experts_in_float64, moe_case, rmse_ratio
from tests.ops.prefill_case import (
    KdaCase,
    check_in_graphs,
    conv_boundaries,
    conv_case,
    kda_boundaries,
    mla_case,
    ratio,
)
from thalweg.ops import Op, Resolver, Where
from thalweg.ops.attention.mla import MLA_PREFILL, MlaPrefillDims
from thalweg.ops.delta.gdn import GDN_MIXER_PREFILL, GdnDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_PREFILL, KdaMixerDims
from thalweg.ops.host_tables import StepSequences
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims


def check_conv1d() -> None:
    from thalweg.ops.delta.conv1d import reference, triton

    for lengths, C, W in (((0, 1, 2, 3, 40, 0, 33), 20, 3), ((5, 64), 300, 1), ((50,), 8, 16)):
        x, state, *rest = conv_case(lengths, C, W, torch.float32)
        expected_state = state.clone()
        expected = reference.conv1d_prefill(x, expected_state, *rest)
        torch.testing.assert_close(triton.conv1d_prefill(x, state, *rest), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(state.view(torch.int32), expected_state.view(torch.int32))


def check_conv1d_boundaries() -> None:
    from thalweg.ops.delta.conv1d import triton

    conv_boundaries(triton.conv1d_prefill, "cpu", torch.float32)


def check_kda_boundaries() -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    kda_boundaries(kda_prefill, "cpu", torch.float32, H=1, K=16)


def check_elementwise() -> None:
    from thalweg.ops.activation import reference as activation
    from thalweg.ops.activation.triton import silu_and_mul
    from thalweg.ops.delta.kda import reference as kda
    from thalweg.ops.delta.kda.triton.gate import kda_gate
    from thalweg.ops.norm import reference as norm
    from thalweg.ops.norm.triton.gated import gated_rms_norm

    f, A_log, dt_bias = torch.randn(70, 2, 3, 24)[:, 1] * 20, torch.randn(3), torch.randn(3, 24)
    torch.testing.assert_close(kda_gate(f, A_log, dt_bias), kda.kda_gate(f, A_log, dt_bias), rtol=2e-6, atol=0)
    o, gate, weight = torch.randn(70, 3, 24), torch.randn(70, 2, 3, 24)[:, 1], torch.randn(24)
    for silu in (False, True):
        expected = norm.gated_rms_norm(o, gate, weight, 1e-5, silu=silu)
        torch.testing.assert_close(gated_rms_norm(o, gate, weight, 1e-5, silu=silu), expected)
    x = torch.randn(5, 2, 2600)[:, 1]
    torch.testing.assert_close(silu_and_mul(x), activation.silu_and_mul(x))


def check_kda() -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    for lengths in ((0, 1, 15, 16, 17, 0), (63, 64, 65), (200,)):
        case = KdaCase(lengths, 2, 32, 24, torch.float32)
        case.check(case.run(kda_prefill), 1e-6)
    for gate in (-30.0, -8.0, 8.0, 30.0):
        case = KdaCase((70,), 2, 32, 24, torch.float32, gate=gate)
        case.check(case.run(kda_prefill), 1e-6)
    case = KdaCase((70,), 1, 32, 24, torch.float32, state_dtype=torch.bfloat16)
    case.check(case.run(kda_prefill), 1e-6, state_tolerance=2**-7)


def check_kda_zero_and_equal_keys() -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    for value in (0.0, 1.0):
        case = KdaCase((70,), 2, 32, 24, torch.float32, gate=-30.0)
        case.k, case.beta = torch.full_like(case.k, value), torch.ones_like(case.beta)
        case.check(case.run(kda_prefill), 1e-6)


def check_kda_keeps_neighbours_apart() -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    case = KdaCase((20, 70), 2, 32, 24, torch.float32)
    case.v[:20] = torch.nan
    out = case.run(kda_prefill)
    assert out[:20].isnan().any()
    assert out[20:].isfinite().all()


def check_gdn_by_the_kernels_of_kda() -> None:
    from thalweg.ops.delta.gdn.reference import prefill_by
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    for shape in (GdnShape(2, 6, 16, 24), GdnShape(1, 2, 32, 16)):
        case = PrefillCase(shape, (0, 1, 16, 70, 0))
        case.check(case.run(prefill_by(kda_prefill)), 1e-5)


def check_mla() -> None:
    from thalweg.ops.attention.mla import expanded, reference
    from thalweg.ops.attention.mla.triton.prefill import mla_prefill

    for most in (expanded.MAX_CONTEXT, 50):  # sequences together; one by one, and in parts
        expanded.MAX_CONTEXT = most
        for cached, new in (([0], [130]), ([0, 5, 0, 33, 0], [1, 64, 0, 20, 70]), ([100], [7]), ([3, 0], [0, 200])):
            arguments = mla_case(cached, new, torch.float32)
            assert ratio(mla_prefill(**arguments), reference.mla_prefill(**arguments)) < 1e-6


# The last sequence pads the step.
STEPS = [
    StepSequences([0, 70, 70, 100, 128], [5, 0, 64, 0], [(0, 64, 5)]),
    StepSequences([0, 1, 2, 3, 128], [0, 120, 3, 0], []),
    StepSequences([0, 128, 128, 128, 128], [0, 0, 0, 0], [(0, 64, 6), (0, 128, 7)]),
]


def check_conv1d_in_graphs() -> None:
    from thalweg.ops.delta.conv1d.triton import conv1d_prefill

    x, weight, before = torch.randn(128, 20), torch.randn(20, 4), torch.randn(8, 3, 20)

    def run(offsets: Any, starts: Any, boundaries: Any) -> list[torch.Tensor]:
        state = before.clone()
        y = conv1d_prefill(x, state, torch.tensor([1, 2, 3, 0]), offsets, weight, boundaries=boundaries)
        return [y, state]

    check_in_graphs(run, STEPS, 128)


def check_kda_in_graphs() -> None:
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    q, k, v, f = (torch.randn(128, 1, 16) for _ in range(4))
    before, beta = torch.randn(8, 1, 16, 16), torch.rand(128, 1)

    def run(offsets: Any, starts: Any, boundaries: Any) -> list[torch.Tensor]:
        where = dict(state_NHVK=before.clone(), slots_B=torch.tensor([1, 2, 3, 0]), offsets=offsets)
        o = kda_prefill(q, k, v, -f.exp(), beta, **where, boundaries=boundaries)
        return [o, where["state_NHVK"]]

    check_in_graphs(run, STEPS, 128)


def check_mla_in_graphs() -> None:
    from thalweg.ops.attention.mla.triton.prefill import mla_prefill

    arguments = mla_case([130] * 4, [32] * 4, torch.float32)

    def run(offsets: Any, starts: Any, boundaries: Any) -> list[torch.Tensor]:
        return [mla_prefill(**arguments | {"offsets": offsets, "context_lens": starts})]

    arguments["blocks_MSC"].nan_to_num_()
    check_in_graphs(run, STEPS, 300)


def in_float64_of_parts(
    residual_TD: torch.Tensor,
    parts_PD: torch.Tensor,
    *,
    weights_Tk: torch.Tensor | None = None,
    own_TD: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """A `finish`: of outputs of pairs, or of their sum if there were slices."""
    assert own_TD is None
    assert scale == 1.0
    if weights_Tk is not None:
        parts_PD = (parts_PD.double().view(*weights_Tk.shape, -1) * weights_Tk.double().unsqueeze(-1)).sum(1)
    return residual_TD.double() + parts_PD


def check_experts() -> None:
    from thalweg.ops.moe.experts.triton import grouped

    for T, D, I, E, k, shared in ((70, 96, 33, 6, 3, 1), (5, 100, 48, 24, 3, 0), (150, 64, 32, 3, 2, 2)):
        for most in (grouped.SLICE, 64):
            case = moe_case(T, D, I, E, k, shared, torch.float32)
            whole = grouped.SLICE
            grouped.SLICE = most
            y = case.run(grouped.experts_of_groups)
            added = case.run(grouped.experts_of_groups, residual_TD=case.residual)
            finished = case.run(grouped.experts_of_groups, finish=partial(in_float64_of_parts, case.residual))
            grouped.SLICE = whole
            assert rmse_ratio(finished, experts_in_float64(case) + case.residual.double()) < 1e-6
            assert rmse_ratio(y, experts_in_float64(case)) < 1e-6
            assert torch.equal(added, y + case.residual)
            y = case.run(grouped.experts_of_groups, promise=False)
            assert rmse_ratio(y, experts_in_float64(case)) < 1e-6


@pytest.mark.slow
def test_kda_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kda, check_kda_zero_and_equal_keys, check_kda_keeps_neighbours_apart)


def test_small_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_conv1d, check_conv1d_boundaries, check_conv1d_in_graphs, check_elementwise)


def test_kda_boundaries_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kda_boundaries)


@pytest.mark.slow
def test_kda_in_graphs_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kda_in_graphs)


def test_gdn_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_gdn_by_the_kernels_of_kda)


def test_mla_and_experts_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_mla_in_graphs, check_mla, check_experts)


BF16 = ["kv", *"qkvoxwhyupf", "out", "latent", "blocks", "q_decayed", "k_decayed", "gate", "weight"]
FP32 = ["beta", "G", "g", "A_log", "dt_bias", "acc", "most", "total", "weights", "state"]
INT32 = [
    "pieces",
    "saves",
    "offsets",
    "firsts",
    "kv_offsets",
    "spans",
    "sorted",
    "blocks",
    "counts",
    "ranks",
    "block_tables",
]
TYPES = {
    **{f"{name}_ptr": "*bf16" for name in BF16},
    **{f"{name}_ptr": "*fp32" for name in FP32},
    **{f"{name}_ptr": "*i32" for name in INT32},
    "ids_ptr": "*i64",
    "slots_ptr": "*i64",
    "scale": "fp32",
    "eps": "fp32",
}


def compiled(kernel: object, constants: dict[str, object], num_warps: int = 4) -> Compiled:
    names = [p.name for p in kernel.params if not p.is_constexpr and p.name not in constants]  # type: ignore[attr-defined]
    types = {name: TYPES.get(name, "i32") for name in names}
    return compile_sm90(kernel, types, constants, num_warps)


def test_kda_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    import triton.language as tl

    from thalweg.ops.delta.kda.triton import prefill

    shape = dict(H=32, K=128, V=128, CHUNK=64)
    within = compiled(
        prefill.within_chunks_kernel, shape | dict(BLOCK=32, BLOCK_K=128, UNIT=tl.float16, WIDE=tl.bfloat16), 8
    )
    assert within.spilled_bytes == 0
    across = compiled(prefill.across_chunks_kernel, shape | dict(BLOCK_K=128, BLOCK_V=32, WIDE=tl.bfloat16, STAGES=2))
    assert across.spilled_bytes == 0


def test_experts_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.moe.experts.triton import grouped

    for rows, warps in ((64, 4), (128, 8)):
        tile = dict(s_ptr=None, D=2304, I=1024, ROWS=rows, TAIL=rows // 2, STAGES=4)
        gate_up = compiled(
            grouped.gate_up_grouped_kernel, tile | dict(x_scale_ptr=None, K=9, BLOCK_I=128, BLOCK_D=64), warps
        )
        down = compiled(grouped.down_grouped_kernel, tile | dict(BLOCK_D=256, BLOCK_I=64), warps)
        for kernel in (gate_up, down):
            assert kernel.spilled_bytes == 0
            assert "wgmma" in kernel.ptx


def test_mla_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla.triton.prefill import attend_kernel

    shape = dict(H=32, K=128, V=128, R=512, BLOCK_M=128, BLOCK_N=64, STAGES=3)
    for part, P in ((False, 64), (True, 64), (True, 128)):
        kernel = compiled(attend_kernel, shape | dict(PART=part, P=P), 8)
        assert kernel.spilled_bytes == 0
        assert kernel.shared_bytes <= 227 * 1024
        assert "wgmma" in kernel.ptx


@pytest.mark.parametrize(
    ("op", "dims", "reason"),
    [
        (KDA_MIXER_PREFILL, KdaMixerDims(H=2, K=16, V=16, R=16, W=17), "at most 16 inputs, not 17"),
        (GDN_MIXER_PREFILL, GdnDims(G=1, H=2, K=256, V=16, W=3), "heads of at most 128, not 256 and 16"),
        (MLA_PREFILL, MlaPrefillDims(H=8, K=256, V=128, R=512, P=64), "from 16 to 128, not 256, 128, 64"),
        (NORM_ROUTER, NormRouterDims(E=8, D=128, K=6, G=8, S=1), "groups of 2 experts or more, not 8 in 8"),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else None,
)
def test_other_shapes_go_to_the_reference_and_say_why(op: Op[Any, Any], dims: object, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(op, Where("cuda", "bfloat16"), dims)
    [choice] = resolver.explain()
    assert [span.name for span in choice.table] == ["reference"]
    assert reason in dict(choice.refused)["triton"]
