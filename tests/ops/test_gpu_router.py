"""Norm, router and choice in one launch on a GPU, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.moe_case import MoeCase, moe_case, routed
from thalweg.ops.linear.cuda import linear_add
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims, few
from thalweg.ops.moe.router.cuda import norm_router
from thalweg.ops.moe.router.reference import route
from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain.counters import counters

pytestmark = pytest.mark.gpu


def check(case: MoeCase, k: int, renormalize: bool = True, scale: float = 2.446, scoring: str = "sigmoid") -> None:
    (T, D), E, shared = case.x.shape, len(case.bias), case.num_shared
    dims = NormRouterDims(
        E=E, D=D, K=k, G=1, S=shared, gated=len(case.router_weight) > E, norm_fp32=case.norm.dtype == torch.float32
    )
    op = Resolver().resolve(NORM_ROUTER, Where("cuda", "bfloat16"), dims)  # many tokens: others
    normed, weights, ids = routed(op, case, k, renormalize, scale, scoring)
    torch.testing.assert_close(normed, rms_norm(case.x, case.norm, 1e-5), rtol=2**-7, atol=1e-6)
    # Of the rows as they were normed. Where it chose otherwise, the two experts must be as good as equal.
    logits, gate = (normed.double() @ case.router_weight.double().T).tensor_split([E], dim=1)
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    choice = scores + case.bias.double()
    torch.testing.assert_close(choice.gather(1, ids[:, :k]), choice.topk(k).values, rtol=0, atol=1e-5)
    assert all(len(set(row)) == k + shared for row in ids.tolist())
    chosen = scores.gather(1, ids[:, :k])
    if renormalize:
        chosen = chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(weights[:, :k].double() / scale, chosen, rtol=0, atol=1e-5)
    assert ids[:, k:].tolist() == [list(range(E, E + shared))] * T
    if gate.shape[1]:
        torch.testing.assert_close(weights[:, k:].double(), gate.sigmoid().expand(-1, shared), rtol=0, atol=1e-5)
    else:
        assert (weights[:, k:] == 1).all()


@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 100, 127, 128, 129, 257, 600, 1033, 2048, 2049])
def test_batch_sizes(T: int) -> None:
    check(moe_case(T, 2304, 16, 256, 8, 1, torch.bfloat16, "cuda", seed=T), 8)


@pytest.mark.parametrize("T", [1, 5, 40, 300])
@pytest.mark.parametrize(
    ("D", "E", "k", "shared"),
    [
        (1024, 64, 6, 2),
        (256, 32, 4, 0),
        (2048, 128, 7, 1),
        (4096, 256, 8, 1),
        (768, 96, 16, 3),
        (512, 512, 30, 2),
        (7168, 384, 8, 0),  # weights in two parts; one token in registers
        (3584, 64, 8, 1),
    ],
)
def test_other_shapes(T: int, D: int, E: int, k: int, shared: int) -> None:
    check(moe_case(T, D, 16, E, k, shared, torch.bfloat16, "cuda", seed=T), k)


@pytest.mark.parametrize("T", [1, 5, 32, 40, 128, 129, 600])
@pytest.mark.parametrize(("D", "E", "k", "shared"), [(2048, 256, 8, 1), (2048, 512, 10, 1), (7168, 384, 8, 2)])
def test_gated_shared_experts_behind_a_norm_in_float32(T: int, D: int, E: int, k: int, shared: int) -> None:
    case = moe_case(T, D, 16, E, k, shared, torch.bfloat16, "cuda", seed=T, gated=True)
    case.norm = 1 + torch.randn(D, device="cuda", generator=torch.Generator("cuda").manual_seed(T)) * 0.2
    case.bias.zero_()
    check(case, k, scale=1.0, scoring="softmax")


@pytest.mark.parametrize("T", [1, 8, 9, 64, 100])
@pytest.mark.parametrize(("D", "E", "groups", "kept"), [(7168, 256, 8, 4), (1024, 64, 2, 1), (512, 48, 3, 2)])
def test_groups(T: int, D: int, E: int, groups: int, kept: int) -> None:
    """Experts of the best groups alone; in groups that are not of 32, in Triton."""
    case = moe_case(T, D, 16, E, 6, 1, torch.bfloat16, "cuda", seed=T)
    case.bias *= 0.01
    dims = NormRouterDims(E=E, D=D, K=6, G=groups, S=1)
    op = Resolver().resolve(NORM_ROUTER, Where("cuda", "bfloat16"), dims)
    normed, weights, ids = routed(op, case, 6, n_group=groups, topk_group=kept)
    logits = normed.float() @ case.router_weight.float().T
    expected, expected_ids = route(logits, case.bias, 6, True, 1.0, "sigmoid", groups, kept)
    same = (ids[:, :6] == expected_ids).all(1)
    assert same.float().mean() > 0.9  # logits that are as good as equal may change places
    torch.testing.assert_close(weights[same, :6], expected[same], rtol=0, atol=1e-5)


@pytest.mark.parametrize("T", [1, 8, 40])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_scores(T: int, scoring: str, renormalize: bool) -> None:
    check(moe_case(T, 2304, 16, 256, 8, 1, torch.bfloat16, "cuda"), 8, renormalize, 1.5, scoring)


@pytest.mark.parametrize("T", [1, 8, 40])
def test_of_equals_the_lower_id_comes_first(T: int) -> None:
    case = moe_case(T, 256, 16, 64, 8, 1, torch.bfloat16, "cuda")
    # Experts 2 p, 2 p + 1, 32 + 2 p and 32 + 2 p + 1 are equals.
    case.router_weight[1:32:2], case.bias[1:32:2] = case.router_weight[0:32:2], case.bias[0:32:2]
    case.router_weight[32:], case.bias[32:] = case.router_weight[:32], case.bias[:32]
    check(case, 8)
    for row in routed(norm_router, case, 8)[2].tolist():
        assert [e % 32 // 2 for e in row[:8]] == [row[0] // 2] * 4 + [row[4] // 2] * 4
        assert row[:4] == sorted(row[:4])
        assert row[4:8] == sorted(row[4:8])
    case.router_weight[:], case.bias[:] = case.router_weight[0].clone(), 0
    assert routed(norm_router, case, 8)[2].tolist() == [[*range(8), 64]] * T


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_it_keeps_ids_in_range_whatever_comes(scoring: str) -> None:
    case = moe_case(12, 256, 16, 64, 8, 1, torch.bfloat16, "cuda")
    expected = routed(norm_router, case, 8, scoring=scoring)
    case.x[0], case.x[1, 3], case.x[2], case.x[9] = torch.nan, torch.inf, 0, torch.nan
    found = routed(norm_router, case, 8, scoring=scoring)
    assert [found[2][t].tolist() for t in (0, 1, 9)] == [[*range(8), 64]] * 3
    for row in found[2].tolist():
        assert len(set(row)) == 9
        assert set(row) <= set(range(65))
    clean = [3, 4, 5, 6, 7, 8, 10, 11]
    assert all(torch.equal(a[clean], b[clean]) for a, b in zip(found, expected, strict=True))
    case.bias[5] = torch.nan
    assert (routed(norm_router, case, 8, scoring=scoring)[2][clean] != 5).all()


def test_a_token_does_not_depend_on_the_others() -> None:
    case = moe_case(128, 2304, 16, 256, 8, 1, torch.bfloat16, "cuda")
    whole, x = routed(norm_router, case, 8), case.x
    for first, last in ((0, 1), (37, 38), (3, 11), (60, 92), (20, 120)):
        case.x = x[first:last]
        for part, all_of_it in zip(routed(norm_router, case, 8), whole, strict=True):
            assert torch.equal(part, all_of_it[first:last])


def test_rows_with_a_stride() -> None:
    case = moe_case(9, 2304, 16, 256, 8, 1, torch.bfloat16, "cuda")
    expected = routed(norm_router, case, 8)
    case.x = torch.cat([case.x, torch.full_like(case.x, torch.nan)], 1)[:, :2304]
    assert all(torch.equal(a, b) for a, b in zip(routed(norm_router, case, 8), expected, strict=True))


@pytest.mark.parametrize(("D", "E"), [(512, 64), (300, 40)])
def test_rows_that_begin_at_an_odd_address(D: int, E: int) -> None:
    case = moe_case(3, D, 16, E, 4, 1, torch.bfloat16, "cuda")
    case.x = torch.cat([case.x, case.x[:, :1]], 1)[:, 1:]
    check(case, 4)


@pytest.mark.parametrize("T", [1, 8, 40, 128])
def test_in_a_graph_under_load(T: int) -> None:
    """Between kernels that overlap it: replays must equal a run with nothing in flight."""
    cases = [moe_case(T, 2304, 16, 256, 8, 1, torch.bfloat16, "cuda", seed=i) for i in range(12)]

    def chain(wait: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        found, x = [], cases[0].x
        for case in cases:
            case.x = x
            found.append(routed(norm_router, case, 8))
            x = found[-1][0]  # reads what the kernel ahead writes last
            if wait:
                torch.cuda.synchronize()
        return found

    first = cases[0].x
    expected = chain(wait=True)
    cases[0].x = first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(wait=False)
    for _ in range(30):
        for tensors in found:
            for tensor in tensors:
                tensor.fill_(0)
        graph.replay()
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def wide_case(seed: int = 0) -> MoeCase:
    return moe_case(1, 7168, 16, 384, 8, 1, torch.bfloat16, "cuda", seed=seed)


def test_one_token_of_equals_and_of_nan() -> None:
    case = wide_case()
    case.router_weight[:], case.bias[:] = case.router_weight[0].clone(), 0
    assert routed(few.norm_router, case, 8)[2].tolist() == [[*range(8), 384]]
    case.x[0, 5] = torch.nan
    assert routed(few.norm_router, case, 8)[2].tolist() == [[*range(8), 384]]


def test_one_token_in_a_graph_under_load() -> None:
    """Behind a projection whose blocks it stands beside; a launch leaves the places of logits as it found them."""
    cases = [wide_case(i) for i in range(6)]
    weight = torch.randn(7168, 7168, device="cuda").bfloat16() / 85

    def chain(wait: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        found, x = [], first
        for case in cases:
            case.x = linear_add(x, weight, x)
            found.append(routed(few.norm_router, case, 8))
            x = found[-1][0]
            if wait:
                torch.cuda.synchronize()
        return found

    first = cases[0].x
    expected = [tuple(t.clone() for t in tensors) for tensors in chain(wait=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(wait=False)
    for _ in range(100):
        for tensors in found:
            for tensor in tensors:
                tensor.fill_(0)
        graph.replay()
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not counters("norm_router", weight.device, 2 * 384).any()
