"""The KDA decode mixer's kernels on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.kda_mixer_case import check_kda_mixer, error, kda_mixer_case, kda_mixer_fp64
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KdaMixerDecode, KdaMixerDims
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu


def kernel(name: str, H: int = 32, K: int = 128, R: int = 128, dtype: str = "bfloat16") -> KdaMixerDecode:
    resolver = Resolver({"kda_mixer_decode": name})
    return resolver.resolve(KDA_MIXER_DECODE, Where("cuda", dtype), KdaMixerDims(H=H, K=K, V=K, R=R, W=3))


@pytest.fixture(params=["cuda", "triton"])
def op(request: pytest.FixtureRequest) -> KdaMixerDecode:
    return kernel(request.param)


# 1 to 4: a head over blocks of a cluster; 9: two passes of a block; 70 and 130: many.
@pytest.mark.parametrize("B", [1, 2, 3, 4, 7, 8, 9, 32, 70, 130])
def test_batch_sizes(op: KdaMixerDecode, B: int) -> None:
    check_kda_mixer(op, kda_mixer_case(B, 32, 128, 128, torch.bfloat16, "cuda", seed=B), 0.005, 1e-5)


@pytest.mark.parametrize("B", [1, 3, 8, 40])
@pytest.mark.parametrize("H", [4, 12])
def test_heads_of_a_rank(op: KdaMixerDecode, B: int, H: int) -> None:
    check_kda_mixer(op, kda_mixer_case(B, H, 128, 128, torch.bfloat16, "cuda"), 0.005, 1e-5)


@pytest.mark.parametrize(("H", "K", "R"), [(3, 128, 128), (1, 64, 32), (12, 32, 64)])
@pytest.mark.parametrize("B", [3, 20])
def test_other_shapes(B: int, H: int, K: int, R: int) -> None:
    case = kda_mixer_case(B, H, K, R, torch.bfloat16, "cuda")
    check_kda_mixer(kernel("triton", H, K, R), case, 0.005, 1e-5)


def test_float32() -> None:
    case = kda_mixer_case(3, 32, 128, 128, torch.float32, "cuda")
    check_kda_mixer(kernel("triton", dtype="float32"), case, 1e-5, 1e-5)


@pytest.mark.parametrize("B", [2, 5])
@pytest.mark.parametrize("gate", [8.0, 30.0])
def test_extreme_gates_and_zero_keys(op: KdaMixerDecode, gate: float, B: int) -> None:
    case = kda_mixer_case(B, 32, 128, 128, torch.bfloat16, "cuda", gate=gate)
    case.proj[B // 2] = 0
    case.conv_state[case.slots[B // 2]] = 0
    check_kda_mixer(op, case, 0.005, 1e-5)


@pytest.mark.parametrize("B", [1, 2, 4, 19])
def test_bf16_state_is_rounded_once(op: KdaMixerDecode, B: int) -> None:
    case = kda_mixer_case(B, 32, 128, 128, torch.bfloat16, "cuda")
    case.state = case.state.bfloat16()
    check_kda_mixer(op, case, 0.005, 0.003)


@pytest.mark.parametrize("B", [1, 2, 9])
def test_steps_in_a_graph_under_load(op: KdaMixerDecode, B: int) -> None:
    """Calls that overlap their neighbours, replayed: each must see the state that its own last one left."""
    case = kda_mixer_case(B, 32, 128, 128, torch.bfloat16, "cuda")
    expected = case.copy()
    steps = 12
    for _ in range(steps):
        _, state, conv_state = kda_mixer_fp64(expected)
        expected.state = expected.state.double()
        expected.state[case.slots] = state
        expected.conv_state = expected.conv_state.clone()
        expected.conv_state[case.slots] = conv_state.to(torch.bfloat16)
    out, _, _ = kda_mixer_fp64(expected)
    after, other = case.copy(), case.copy()
    after.slots = case.slots.clone()
    case.copy().run(op)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            after.run(op)
            other.run(op)  # another layer's: it may start early
            after.slots.copy_(case.slots)  # an ordinary launch, as there is between two steps
        got = after.run(op)
    for _ in range(20):
        after.state.copy_(case.state)
        after.conv_state.copy_(case.conv_state)
        got.fill_(torch.nan)
        graph.replay()
        assert error(got, out) < 0.005


def test_rows_that_share_the_sink_leave_the_others_right(op: KdaMixerDecode) -> None:
    case = kda_mixer_case(16, 32, 128, 128, torch.bfloat16, "cuda")
    o, _, _ = kda_mixer_fp64(case)
    padded = case.copy()
    padded.slots = padded.slots.clone()
    padded.slots[9:] = 0
    for _ in range(10):
        out = padded.copy().run(op)
        assert error(out[:9], o[:9]) < 0.005
        assert torch.isfinite(out).all()
