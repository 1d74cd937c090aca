"""Ops "norm_router" and "experts" on the device."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.ops.moe_case import MoeCase, experts_in_float64, moe_case, rmse_ratio, routed
from thalweg.ops.linear import LINEAR_ADD, NORM_LINEAR, LinearDims, NormLinearDims
from thalweg.ops.moe.experts import EXPERTS, Experts, reference
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims
from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.registry import Resolver, Where
from thalweg.quant import PLAIN

pytestmark = pytest.mark.gpu


def experts_of(case: MoeCase) -> Experts:
    return Resolver().resolve(EXPERTS, Where("cuda", str(case.x.dtype).removeprefix("torch.")), case.dims)


@pytest.mark.parametrize("T", [1, 2, 3, 8, 100, 257])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (300, 72, 40, 3, 0)])
def test_experts(T: int, dtype: torch.dtype, tolerance: float, D: int, I: int, E: int, k: int, shared: int) -> None:
    case = moe_case(T, D, I, E, k, shared, dtype, "cuda", seed=T)
    assert rmse_ratio(case.run(experts_of(case)), experts_in_float64(case)) < tolerance


@pytest.mark.parametrize("T", [1, 8, 64])
def test_experts_at_the_published_shape(T: int) -> None:
    case = moe_case(T, 2304, 1024, 256, 8, 1, torch.bfloat16, "cuda")
    expected = case.run(partial(reference.experts, PLAIN))
    assert rmse_ratio(case.run(experts_of(case)), expected) < 0.005


def test_experts_all_tokens_on_the_same_few() -> None:
    case = moe_case(200, 256, 64, 64, 4, 1, torch.bfloat16, "cuda")
    case.ids[:, :4] = torch.arange(4, device="cuda")
    assert rmse_ratio(case.run(experts_of(case)), experts_in_float64(case)) < 0.005


@pytest.mark.parametrize("T", [1, 2, 3, 8, 33, 128, 512, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_add(T: int, dtype: torch.dtype) -> None:
    case = moe_case(T, 256, 64, 32, 8, 1, dtype, "cuda", seed=T)
    case.x[T // 2] = torch.nan
    found = case.run(experts_of(case), residual_TD=case.residual)
    expected = case.run(experts_of(case)).float() + case.residual.float()
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert found.isnan().any(1).nonzero().tolist() == [[T // 2]]


@pytest.mark.parametrize("T", [1, 3, 8, 33, 512, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("D", "E", "k", "shared"), [(2304, 256, 8, 1), (300, 37, 4, 0), (1024, 900, 16, 2)])
def test_router(T: int, dtype: torch.dtype, D: int, E: int, k: int, shared: int) -> None:
    where, dims = Where("cuda", str(dtype).removeprefix("torch.")), NormRouterDims(E=E, D=D, K=k, G=1, S=shared)
    norm_router = Resolver({"norm_router": "triton"}).resolve(NORM_ROUTER, where, dims)  # many tokens: "library"
    case = moe_case(T, D, 16, E, k, shared, dtype, "cuda", seed=T)
    normed, weights, ids = routed(norm_router, case, k, True, 2.446)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(normed, rms_norm(case.x, case.norm, 1e-5), rtol=tolerance, atol=1e-6)
    # Scores in float64: where the kernel chose otherwise, the two experts must be as good as equal.
    scores = (normed.double() @ case.router_weight.double().T).sigmoid()
    choice = scores + case.bias.double()
    torch.testing.assert_close(choice.gather(1, ids[:, :k]), choice.topk(k).values, rtol=0, atol=1e-5)
    assert all(len(set(row)) == k + shared for row in ids.tolist())
    chosen = scores.gather(1, ids[:, :k])
    torch.testing.assert_close(weights[:, :k].double(), chosen / chosen.sum(1, keepdim=True) * 2.446, rtol=0, atol=1e-5)
    assert ids[:, k:].tolist() == [list(range(E, E + shared))] * T
    assert (weights[:, k:] == 1).all()


def test_router_keeps_ids_in_range_whatever_comes() -> None:
    from thalweg.ops.moe.router.triton import norm_router

    case = moe_case(4, 256, 16, 64, 8, 1, torch.bfloat16, "cuda")
    expected = routed(norm_router, case, 8)
    case.x[0], case.x[1, 3], case.x[2] = torch.nan, torch.inf, 0
    found = routed(norm_router, case, 8)
    for row in found[2].tolist():
        assert len(set(row)) == 9
        assert set(row) <= set(range(65))
    assert all(torch.equal(a[3], b[3]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("T", [1, 8, 40])
@pytest.mark.parametrize("router", ["cuda", "triton"])
def test_chained_in_a_graph(T: int, router: str) -> None:
    """Each kernel may start before the one ahead is done; replays must still equal a run with nothing in flight."""
    where, dims = Where("cuda", "bfloat16"), NormRouterDims(E=64, D=512, K=8, G=1, S=1)
    norm_router = Resolver({"norm_router": router}).resolve(NORM_ROUTER, where, dims)
    norm_linear = Resolver().resolve(NORM_LINEAR, where, NormLinearDims(D=512, parts=(512,)))
    linear_add = Resolver().resolve(LINEAR_ADD, where, LinearDims(D=512, O=512))
    layers = [moe_case(T, 512, 256, 64, 8, 1, torch.bfloat16, "cuda", seed=i) for i in range(10)]

    def chain(wait: bool) -> torch.Tensor:
        def done() -> None:
            if wait:
                torch.cuda.synchronize()

        x = first.clone()  # linear_add may add in place
        for case in layers:
            proj = norm_linear(x, case.norm, 1e-5, case.gate_up[0][0])
            done()
            x = linear_add(proj, transposed[id(case)], x)
            done()
            case.x = x
            n, weights, ids = routed(norm_router, case, 8, True, 2.4)
            done()
            x = experts(n, weights, ids, case.gate_up, case.down, residual_TD=x, num_shared=1)
            done()
        return x

    first, experts = layers[0].x, experts_of(layers[0])
    transposed = {id(case): case.gate_up[0][1].T.contiguous() for case in layers}
    expected = chain(wait=True).clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(50):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
