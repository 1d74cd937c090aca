"""Norm and router within the experts' first launch, of one token; what a batch's experts need within the router's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.ops.moe_case import (
    MoeCase,
    experts_in_float64,
    in_float8,
    moe_case_fp8,
    moe_case_int4,
    rmse_ratio,
    routed,
)
from tests.ops.replays import check_replays
from thalweg.ops.moe.experts import EXPERTS
from thalweg.ops.moe.routed import ROUTED_EXPERTS, RoutedExperts, RoutedExpertsDims
from thalweg.ops.moe.router.reference import norm_router
from thalweg.ops.norm import NextNorm
from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu
WHERE = Where("cuda", "bfloat16")
SHAPES = [
    ("int4", 7168, 2048, 32, 8),
    ("int4", 7168, 256, 384, 8),
    ("int4", 4096, 512, 64, 6),
    ("fp8", 7168, 2048, 32, 8),
]


def case_of(scheme: str, D: int, I: int, E: int, k: int, seed: int = 0) -> MoeCase:
    if scheme == "int4":
        return moe_case_int4(1, D, I, E, k, torch.bfloat16, "cuda", seed=seed, own=I, scale=2.5)
    return moe_case_fp8(1, D, I, E, k, 1, torch.bfloat16, "cuda", seed=seed, published=True)


def op_of(case: MoeCase, k: int, name: str = "cuda") -> RoutedExperts:
    dims = RoutedExpertsDims(experts=case.dims, K=k, G=1, S=case.num_shared, scoring="sigmoid", renormalize=True)
    return Resolver({"routed_experts": name}).resolve(ROUTED_EXPERTS, WHERE, dims)


def nothing(x_TD: Tensor) -> Tensor:
    raise AssertionError("one token is to be served")


def run(op: RoutedExperts, case: MoeCase, x_TD: Tensor, next_norm: NextNorm | None = None) -> Tensor:
    router = (case.norm, 1e-5, case.router_weight, case.bias, case.gate_up, case.down)
    return op(x_TD, nothing, *router, router_scale=1.5, own=case.own, scale=case.scale, next_norm=next_norm)


@pytest.mark.parametrize(("scheme", "D", "I", "E", "k"), SHAPES)
def test_one_token(scheme: str, D: int, I: int, E: int, k: int) -> None:
    """As router and experts by themselves, which have tests of their own; and the same bits every time."""
    for seed in range(4):
        case = case_of(scheme, D, I, E, k, seed)
        x, op = case.x, op_of(case, k)
        y = run(op, case, x)
        for _ in range(100):
            assert torch.equal(run(op, case, x), y)
        case.x, case.weights, case.ids = routed(norm_router, case, k, True, 1.5)
        expected = case.run(Resolver().resolve(EXPERTS, WHERE, case.dims))
        assert rmse_ratio(y.float() - x.float(), expected.float()) < 0.012


def batch_of(T: int, seed: int = 0) -> MoeCase:
    return moe_case_fp8(T, 2048, 512, 128, 8, 1, torch.bfloat16, "cuda", seed=seed, published=True)


@pytest.mark.parametrize("T", [17, 32, 33, 100, 128])
def test_a_batch_of_tokens_with_the_norm_behind_it(T: int) -> None:
    """As router and experts by themselves, and the same bits every time, in whatever order lists are."""
    case = batch_of(T)
    x, op = case.x, op_of(case, 8, "w8a8")
    y = run(op, case, x)
    for _ in range(20):
        next_norm = NextNorm(case.norm, 1e-5, wants_float8=True)
        assert torch.equal(run(op, case, x, next_norm), y)
        assert next_norm.in_float8 is not None
        narrow_TD, scale_T = next_norm.in_float8
        assert rmse_ratio(narrow_TD.float() * scale_T[:, None], rms_norm(y, case.norm, 1e-5)) < 0.04
    case.x, case.weights, case.ids = routed(norm_router, case, 8, True, 1.5)
    added = y.float() - x.float()  # rounded with x in it
    by_itself = experts_in_float64(case, quantized=partial(in_float8, columns=128))
    assert max(rmse_ratio(a, b) for a, b in zip(added, by_itself, strict=True)) < 0.06
    assert rmse_ratio(added, by_itself) < 0.05


@pytest.mark.parametrize("T", [17, 128])
def test_batches_in_a_graph(T: int) -> None:
    """Layer behind layer, each of which may start early: lists are those of their own launch."""
    cases = [batch_of(T, seed) for seed in range(4)]
    op = op_of(cases[0], 8, "w8a8")

    def chain(wait: Callable[[], None]) -> Tensor:
        x = cases[0].x
        for case in cases * 2:
            x = run(op, case, x, NextNorm(case.norm, 1e-5, wants_float8=True))
            wait()
        return x

    check_replays(chain)


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_in_a_graph_behind_what_writes_its_token(scheme: str) -> None:
    cases = [case_of(scheme, 7168, 2048, 32, 8, seed) for seed in range(3)]
    op = op_of(cases[0], 8)

    def chain(wait: bool) -> Tensor:
        x = cases[0].x
        for case in cases * 3:
            x = run(op, case, x)
            if wait:
                torch.cuda.synchronize()
            x = x / x.float().square().mean().sqrt().to(x.dtype)
        return x

    expected = chain(wait=True).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(100):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_a_token_that_is_not_finite_ends_and_leaves_the_next_alone(scheme: str) -> None:
    case = case_of(scheme, 7168, 2048, 32, 8)
    op = op_of(case, 8)
    clean, broken = run(op, case, case.x), case.x.clone()
    broken[0, 77] = torch.nan
    assert run(op, case, broken).isnan().all()
    assert torch.equal(run(op, case, case.x), clean)


def test_down_of_one_token_has_the_bits_of_down() -> None:
    from thalweg.ops.moe.experts import cuda_fp8

    case = case_of("fp8", 7168, 2048, 32, 8)
    for seed in range(4):
        torch.manual_seed(seed)
        ids = torch.cat([torch.randperm(32, device="cuda")[:8], torch.tensor([32], device="cuda")])[None]
        given = torch.randn(9, 2048, device="cuda").bfloat16(), ids, *case.down, case.weights, case.x
        expected = cuda_fp8.run_down(*given)
        for _ in range(100):
            assert torch.equal(cuda_fp8.run_down_of_one(*given), expected)
