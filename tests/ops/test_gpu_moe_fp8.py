"""Op "experts_fp8" on the device."""

from __future__ import annotations

import pytest
import torch

from tests.ops.moe_case import experts_in_float64, moe_case_fp8, rmse_ratio

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("T", [1, 2, 3, 8, 33, 128, 512, 600])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (300, 72, 40, 3, 0)])
def test_experts(T: int, dtype: torch.dtype, tolerance: float, D: int, I: int, E: int, k: int, shared: int) -> None:
    from thalweg.ops.moe_fp8.triton_experts import experts_fp8

    case, quantized = moe_case_fp8(T, D, I, E, k, shared, dtype, "cuda", seed=T)
    y = experts_fp8(case.x, case.weights, case.ids, *quantized, shared)
    assert rmse_ratio(y, experts_in_float64(case)) < tolerance


@pytest.mark.parametrize("T", [1, 8, 64, 600])
def test_experts_at_the_published_shape(T: int) -> None:
    from thalweg.ops.moe_fp8 import reference
    from thalweg.ops.moe_fp8.triton_experts import experts_fp8

    case, quantized = moe_case_fp8(T, 2304, 1024, 64, 8, 1, torch.bfloat16, "cuda")
    expected = reference.experts_fp8(case.x, case.weights, case.ids, *quantized, 1)
    assert rmse_ratio(experts_fp8(case.x, case.weights, case.ids, *quantized, 1), expected) < 0.005


@pytest.mark.parametrize("T", [2, 8, 70])
def test_nan_stays_in_its_row(T: int) -> None:
    from thalweg.ops.moe_fp8.triton_experts import experts_fp8

    case, quantized = moe_case_fp8(T, 256, 128, 32, 4, 1, torch.bfloat16, "cuda")
    case.x[1] = torch.nan
    y = experts_fp8(case.x, case.weights, case.ids, *quantized, 1)
    assert y.isnan().all(1).tolist() == [t == 1 for t in range(T)]
    assert y.isfinite().all(1).tolist() == [t != 1 for t in range(T)]


@pytest.mark.parametrize("T", [1, 8, 40])
def test_chained_in_a_graph(T: int) -> None:
    """Each kernel may start before the one ahead is done; replays must still equal a run with nothing in flight."""
    from thalweg.ops.moe_fp8.triton_experts import experts_fp8_add

    layers = [moe_case_fp8(T, 512, 256, 64, 8, 1, torch.bfloat16, "cuda", seed=i) for i in range(10)]

    def chain(wait: bool) -> torch.Tensor:
        x = layers[0][0].x
        for case, quantized in layers:
            normed = torch.nn.functional.rms_norm(x, (512,))
            x = experts_fp8_add(normed, case.weights, case.ids, *quantized, x, 1)
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
