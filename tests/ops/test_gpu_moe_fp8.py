"""Op "experts" over weights in fp8 on the device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.ops.moe_case import (
    MoeCase,
    check_chained_in_a_graph,
    experts_in_float64,
    moe_case_fp8,
    rmse_ratio,
    triton_experts,
)
from thalweg.ops.moe.experts import EXPERTS, Experts, reference
from thalweg.ops.registry import Resolver, Where
from thalweg.quant import scheme_named

pytestmark = pytest.mark.gpu


def experts_of(case: MoeCase, implementation: str) -> Experts:
    """With "cuda" for few tokens, or without it."""
    if implementation == "cuda":
        where = Where("cuda", str(case.x.dtype).removeprefix("torch."))
        return Resolver({"experts": "cuda"}).resolve(EXPERTS, where, case.dims)
    return triton_experts(case)


@pytest.mark.parametrize("T", [1, 2, 3, 8, 33, 128, 512, 600])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (300, 72, 40, 3, 0)])
def test_experts(
    T: int, dtype: torch.dtype, tolerance: float, published: bool, D: int, I: int, E: int, k: int, shared: int
) -> None:
    case = moe_case_fp8(T, D, I, E, k, shared, dtype, "cuda", seed=T, published=published)
    assert rmse_ratio(case.run(experts_of(case, "triton")), experts_in_float64(case)) < tolerance


@pytest.mark.parametrize("T", [1, 8, 64, 257, 600, 4096, 8192])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_experts_at_the_published_shape(T: int, skewed: bool, published: bool) -> None:
    case = moe_case_fp8(T, 2304, 1024, 64, 8, 1, torch.bfloat16, "cuda", published=published)
    if skewed:  # half of the tokens with the same experts
        case.ids[T // 2 :] = case.ids[0]
    # In float32: the reference rounds a weight to x's dtype, which is exact for scales of powers of two alone.
    expected = replace(case, x=case.x.float()).run(partial(reference.experts, scheme_named("fp8")))
    assert rmse_ratio(case.run(experts_of(case, "triton")), expected) < 0.005


@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 15, 16])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "shared"),
    [
        (256, 128, 32, 4, 1),
        (1792, 1536, 20, 3, 0),
        (2304, 1024, 64, 8, 1),
        (7168, 2048, 12, 4, 1),
        (4096, 256, 12, 4, 1),
    ],
)
def test_experts_in_cuda(T: int, published: bool, D: int, I: int, E: int, k: int, shared: int) -> None:
    case = moe_case_fp8(T, D, I, E, k, shared, torch.bfloat16, "cuda", seed=T, published=published)
    case.x[0] *= 2.0**30  # far beyond fp16, which serves products within
    case.x[-1] *= 2.0**-30
    op = experts_of(case, "cuda")
    y = case.run(op)
    expected = experts_in_float64(case)
    assert all(rmse_ratio(a, b) < 0.01 for a, b in zip(y, expected, strict=True))
    rows = [slice(t, t + 1) for t in range(T)]
    alone = [op(case.x[t], case.weights[t], case.ids[t], case.gate_up, case.down, num_shared=shared) for t in rows]
    assert (16 if D <= 3072 else 8) < T or torch.equal(y, torch.cat(alone))  # the others serve beyond


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("T", [2, 8, 13, 70, 300])
def test_nan_stays_in_its_row(T: int, implementation: str) -> None:
    case = moe_case_fp8(T, 256, 128, 32, 4, 1, torch.bfloat16, "cuda")
    case.x[1] = torch.nan
    y = case.run(experts_of(case, implementation))
    assert y.isnan().all(1).tolist() == [t == 1 for t in range(T)]
    assert y.isfinite().all(1).tolist() == [t != 1 for t in range(T)]


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("T", [1, 8, 12, 40])
def test_chained_in_a_graph(T: int, implementation: str) -> None:
    layers = [moe_case_fp8(T, 512, 256, 64, 8, 1, torch.bfloat16, "cuda", seed=i) for i in range(10)]
    check_chained_in_a_graph(layers, experts_of(layers[0], implementation))
