"""Op "experts" with pairs that are left out, as those of other ranks' experts are, in every form for few tokens."""

from __future__ import annotations

import pytest
import torch

from tests.ops.moe_case import MoeCase, check_left_out, moe_case, moe_case_fp8, moe_case_int4
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
