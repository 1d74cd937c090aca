"""The KDA decode mixer's kernel on a GPU, at the real shape, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.kda_mixer_case import check_kda_mixer, error, kda_mixer_case, kda_mixer_fp64
from thalweg.ops.registry import OpContext, Resolver

pytestmark = pytest.mark.gpu


def kernel(H: int = 32, K: int = 128, R: int = 128, dtype: str = "bfloat16") -> object:
    resolver = Resolver({"kda_mixer_decode": "triton"})
    return resolver.resolve("kda_mixer_decode", OpContext("cuda", dtype, {"H": H, "K": K, "V": K, "R": R, "W": 3}))


@pytest.mark.parametrize("B", [1, 2, 7, 8, 9, 32, 96])
def test_batch_sizes(B: int) -> None:
    check_kda_mixer(kernel(), kda_mixer_case(B, 32, 128, 128, torch.bfloat16, "cuda", seed=B), 0.005, 1e-5)


@pytest.mark.parametrize(("H", "K", "R"), [(3, 128, 128), (1, 64, 32), (12, 32, 64)])
@pytest.mark.parametrize("B", [3, 20])
def test_other_shapes(B: int, H: int, K: int, R: int) -> None:
    check_kda_mixer(kernel(H, K, R), kda_mixer_case(B, H, K, R, torch.bfloat16, "cuda"), 0.005, 1e-5)


def test_float32() -> None:
    check_kda_mixer(kernel(dtype="float32"), kda_mixer_case(3, 32, 128, 128, torch.float32, "cuda"), 1e-5, 1e-5)


@pytest.mark.parametrize("gate", [8.0, 30.0])
def test_extreme_gates_and_zero_keys(gate: float) -> None:
    case = kda_mixer_case(5, 32, 128, 128, torch.bfloat16, "cuda", gate=gate)
    case.proj[1] = 0
    case.conv_state[case.slots[1]] = 0
    check_kda_mixer(kernel(), case, 0.005, 1e-5)


def test_bf16_state_is_rounded_once() -> None:
    case = kda_mixer_case(4, 32, 128, 128, torch.bfloat16, "cuda")
    case.state = case.state.bfloat16()
    check_kda_mixer(kernel(), case, 0.005, 0.003)


def test_steps_in_a_graph_under_load() -> None:
    """Calls that overlap their neighbours, replayed: each must see the state the one before it left."""
    op, case = kernel(), kda_mixer_case(2, 32, 128, 128, torch.bfloat16, "cuda")
    expected = case.copy()
    steps = 12
    for _ in range(steps):
        _, state, conv_state = kda_mixer_fp64(expected)
        expected.state = expected.state.double()
        expected.state[case.slots] = state
        expected.conv_state = expected.conv_state.clone()
        expected.conv_state[case.slots] = conv_state.to(torch.bfloat16)
    out, _, _ = kda_mixer_fp64(expected)
    after = case.copy()
    op(*case.arguments())  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            op(*vars(after).values())
        got = op(*vars(after).values())
    for _ in range(20):
        after.state.copy_(case.state)
        after.conv_state.copy_(case.conv_state)
        got.fill_(torch.nan)
        graph.replay()
        assert error(got, out) < 0.005


def test_rows_that_share_the_sink_leave_the_others_right() -> None:
    op, case = kernel(), kda_mixer_case(16, 32, 128, 128, torch.bfloat16, "cuda")
    o, _, _ = kda_mixer_fp64(case)
    padded = case.copy()
    padded.slots = padded.slots.clone()
    padded.slots[9:] = 0
    for _ in range(10):
        out = op(*padded.arguments())
        assert error(out[:9], o[:9]) < 0.005
        assert torch.isfinite(out).all()
