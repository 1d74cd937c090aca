"""Op "experts_fp8" on the device."""

from __future__ import annotations

import pytest
import torch

from tests.ops.moe_case import MoeCase, experts_in_float64, moe_case_fp8, rmse_ratio, triton_experts
from thalweg.ops.moe import ExpertsDims
from thalweg.ops.moe_fp8 import EXPERTS_FP8, ExpertsFp8
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu


def experts_fp8(case: MoeCase, implementation: str) -> ExpertsFp8:
    """With "cuda" for few tokens, or without it."""
    E, D, I = case.down.shape
    dims, where = ExpertsDims(E=E, D=D, I=I), Where("cuda", str(case.x.dtype).removeprefix("torch."))
    if implementation == "cuda":
        return Resolver({"experts_fp8": "cuda"}).resolve(EXPERTS_FP8, where, dims)
    return triton_experts("experts_fp8", len(case.x))


@pytest.mark.parametrize("T", [1, 2, 3, 8, 33, 128, 512, 600])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (300, 72, 40, 3, 0)])
def test_experts(T: int, dtype: torch.dtype, tolerance: float, D: int, I: int, E: int, k: int, shared: int) -> None:
    case, quantized = moe_case_fp8(T, D, I, E, k, shared, dtype, "cuda", seed=T)
    y = experts_fp8(case, "triton")(case.x, case.weights, case.ids, *quantized, num_shared=shared)
    assert rmse_ratio(y, experts_in_float64(case)) < tolerance


@pytest.mark.parametrize("T", [1, 8, 64, 257, 600, 4096, 8192])
@pytest.mark.parametrize("skewed", [False, True])
def test_experts_at_the_published_shape(T: int, skewed: bool) -> None:
    from thalweg.ops.moe_fp8 import reference

    case, quantized = moe_case_fp8(T, 2304, 1024, 64, 8, 1, torch.bfloat16, "cuda")
    if skewed:  # half of the tokens with the same experts
        case.ids[T // 2 :] = case.ids[0]
    arguments = (case.x, case.weights, case.ids, *quantized)
    expected = reference.experts_fp8(*arguments)
    assert rmse_ratio(experts_fp8(case, "triton")(*arguments, num_shared=1), expected) < 0.005


@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (1792, 1536, 20, 3, 0), (2304, 1024, 64, 8, 1)]
)
def test_experts_in_cuda(T: int, D: int, I: int, E: int, k: int, shared: int) -> None:
    case, quantized = moe_case_fp8(T, D, I, E, k, shared, torch.bfloat16, "cuda", seed=T)
    case.x[0] *= 2.0**30  # far beyond fp16, which serves products within
    case.x[-1] *= 2.0**-30
    op = experts_fp8(case, "cuda")
    y = op(case.x, case.weights, case.ids, *quantized, num_shared=shared)
    expected = experts_in_float64(case)
    assert all(rmse_ratio(a, b) < 0.01 for a, b in zip(y, expected, strict=True))
    alone = [
        op(case.x[t : t + 1], case.weights[t : t + 1], case.ids[t : t + 1], *quantized, num_shared=shared)
        for t in range(T)
    ]
    assert T > 16 or torch.equal(y, torch.cat(alone))


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("T", [2, 8, 13, 70, 300])
def test_nan_stays_in_its_row(T: int, implementation: str) -> None:
    case, quantized = moe_case_fp8(T, 256, 128, 32, 4, 1, torch.bfloat16, "cuda")
    case.x[1] = torch.nan
    y = experts_fp8(case, implementation)(case.x, case.weights, case.ids, *quantized, num_shared=1)
    assert y.isnan().all(1).tolist() == [t == 1 for t in range(T)]
    assert y.isfinite().all(1).tolist() == [t != 1 for t in range(T)]


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("T", [1, 8, 12, 40])
def test_chained_in_a_graph(T: int, implementation: str) -> None:
    """Each kernel may start before the one ahead is done; replays must still equal a run with nothing in flight."""
    layers = [moe_case_fp8(T, 512, 256, 64, 8, 1, torch.bfloat16, "cuda", seed=i) for i in range(10)]
    op = experts_fp8(layers[0][0], implementation)

    def chain(wait: bool) -> torch.Tensor:
        x = layers[0][0].x
        for case, quantized in layers:
            normed = torch.nn.functional.rms_norm(x, (512,))
            x = op(normed, case.weights, case.ids, *quantized, residual_TD=x, num_shared=1)
            if wait:
                torch.cuda.synchronize()
        return x

    expected = chain(wait=True).clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(50):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
