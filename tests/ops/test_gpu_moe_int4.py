"""Op "experts" over weights in int4 on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.moe_case import (
    MoeCase,
    check_chained_in_a_graph,
    experts_in_float64,
    implementation,
    moe_case_int4,
    rmse_ratio,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """What torch.empty gives next is full of NaN."""
    torch.empty(2**26, device="cuda").fill_(torch.nan)


def check(case: MoeCase, name: str) -> torch.Tensor:
    expected = experts_in_float64(case)
    op, bound = implementation(name, "int4"), 0.009 if name == "grouped" else 0.006
    y = case.run(op)
    assert y.shape == case.x.shape
    added = case.run(op, residual_TD=case.residual)
    if len(y):
        assert max(rmse_ratio(a, b) for a, b in zip(y, expected, strict=True)) < 3 * bound, name
        assert rmse_ratio(y, expected) < bound, name
        assert rmse_ratio(added, expected + case.residual.double()) < bound, name
    return y


@pytest.mark.parametrize("T", [0, 1, 2, 7, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "own"),
    [
        (1024, 512, 16, 4, 512),
        (768, 512, 9, 3, 0),
        (2304, 256, 16, 8, 0),  # two blocks of a multiprocessor, as few widths have
        (3328, 256, 12, 4, 256),
        (7168, 2048, 12, 4, 2048),
        (7168, 256, 12, 8, 256),
    ],
)
def test_experts_in_cuda(T: int, skewed: bool, D: int, I: int, E: int, k: int, own: int) -> None:
    case = moe_case_int4(T, D, I, E, k, torch.bfloat16, "cuda", seed=T, own=own, scale=2.5)
    if skewed and T:
        case.ids[:] = case.ids[0]
    y = check(case, "cuda")
    op = implementation("cuda", "int4")
    for _ in range(
        20
    ):  # whoever comes last adds up, in one order; and a ring that is filled too early shows now and then
        assert torch.equal(y, case.run(op))
    if T > 1 and not skewed:
        case.x[1] = torch.nan
        poisoned = case.run(op)
        others = torch.arange(T) != 1
        assert poisoned[1].isnan().all()
        assert torch.equal(poisoned[others], y[others])


@pytest.mark.parametrize("T", [0, 1, 2, 7, 16, 17, 64, 300, 1000, 1500])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "own"), [(1024, 512, 16, 4, 512), (264, 40, 20, 3, 72), (7168, 2048, 12, 4, 2048)]
)
def test_experts_in_triton(T: int, skewed: bool, D: int, I: int, E: int, k: int, own: int) -> None:
    case = moe_case_int4(T, D, I, E, k, torch.bfloat16, "cuda", seed=T, own=own, scale=2.5)
    if skewed and T:
        case.ids[:] = case.ids[0]
    for name in ("tiles", "grouped", "matrix", "batch"):
        if (name != "tiles" or T <= 512) and (name in ("tiles", "grouped") or D % 256 == 0):
            check(case, name)


@pytest.mark.parametrize("name", ["tiles", "grouped"])
@pytest.mark.parametrize("T", [3, 40])
def test_experts_in_float32(T: int, name: str) -> None:
    case = moe_case_int4(T, 264, 40, 20, 3, torch.float32, "cuda", own=72, scale=2.5)
    assert rmse_ratio(case.run(implementation(name, "int4")), experts_in_float64(case)) < 1e-5


@pytest.mark.parametrize("T", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("name", ["tiles", "cuda"])
def test_sum_and_residual_are_those_of_the_parts_by_themselves(T: int, name: str) -> None:
    """Bit for bit: scaled addition of the own expert and the routed ones, and the residual's."""
    case = moe_case_int4(T, 1024, 512, 32, 8, torch.bfloat16, "cuda", seed=T, own=512, scale=2.827)
    experts = implementation(name, "int4")
    own, routed = replace(case, scale=0.0).run(experts), replace(case, own=None).run(experts)
    added = case.residual + torch.add(own, routed, alpha=case.scale)
    assert torch.equal(case.run(experts, residual_TD=case.residual), added)


@pytest.mark.parametrize("T", [1, 8, 13, 40])
@pytest.mark.parametrize("name", ["tiles", "cuda"])
def test_chained_in_a_graph(T: int, name: str) -> None:
    layers = [moe_case_int4(T, 512, 256, 64, 8, torch.bfloat16, "cuda", seed=i, own=256, scale=2.5) for i in range(10)]
    check_chained_in_a_graph(layers, implementation(name, "int4"))
