"""Op "experts" with pairs that are left out, as those of other ranks' experts are, in every form for few tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.moe_case import MoeCase, check_left_out, moe_case, moe_case_fp8, moe_case_int4, own_beside
from thalweg.ops.moe.experts import EXPERTS
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu


def case_of(scheme: str, T: int) -> MoeCase:
    if scheme == "int4":
        return moe_case_int4(T, 512, 256, 64, 8, torch.bfloat16, "cuda", seed=T)
    if scheme == "fp8":
        return moe_case_fp8(T, 512, 512, 64, 8, 0, torch.bfloat16, "cuda", published=True)
    return moe_case(T, 512, 256, 64, 8, 0, torch.bfloat16, "cuda", seed=T)


@pytest.mark.parametrize("T", [1, 2, 5, 16, 33, 100, 257, 600])
@pytest.mark.parametrize("scheme", ["none", "fp8", "int4"])
def test_pairs_left_out(scheme: str, T: int) -> None:
    case = case_of(scheme, T)
    experts = Resolver().resolve(EXPERTS, Where("cuda", "bfloat16"), case.dims)
    poison = torch.full((1 << 26,), torch.nan, device="cuda")  # which what is not written then has
    del poison
    check_left_out(case, experts, 0.06 if scheme == "fp8" and T > 16 else 0.01)  # activations in fp8 too


@pytest.mark.parametrize(("T", "first", "count"), [(2, 0, 1), (8, 7, 1), (16, 8, 8), (64, 24, 8), (64, 32, 32)])
@pytest.mark.parametrize(("D", "I", "E"), [(512, 256, 64), (7168, 2048, 12)])
def test_an_own_expert_of_some_tokens_beside_pairs_left_out(
    T: int, first: int, count: int, D: int, I: int, E: int
) -> None:
    case = moe_case_int4(T, D, I, E, 8, torch.bfloat16, "cuda", seed=T, own=I)
    for _ in range(5):
        check_left_out(replace(case, own=None), own_beside(case, (first, count)), 0.01)
