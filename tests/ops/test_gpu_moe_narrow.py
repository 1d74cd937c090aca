"""Op "experts" over weights in fp8 with activations in fp8, for a batch of tokens, on the device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.ops.moe_case import (
    check_chained_in_a_graph,
    experts_in_float64,
    implementation,
    in_float8,
    moe_case_fp8,
    rmse_ratio,
)
from thalweg.ops.moe.experts import JOINED_TOKENS

pytestmark = pytest.mark.gpu


def row_errors(out: Tensor, expected: Tensor) -> list[float]:
    return [rmse_ratio(a, b) for a, b in zip(out, expected, strict=True)]


def mean_square(errors: list[float]) -> float:
    return sum(e * e for e in errors) / len(errors)


FORMS = pytest.mark.parametrize("form", ["tiles_w8a8", "joined_w8a8"])


def check(form: str, T: int, published: bool, D: int, I: int, E: int, k: int, shared: int) -> None:
    case = moe_case_fp8(T, D, I, E, k, shared, torch.bfloat16, "cuda", seed=T, published=published)
    case.x[0] *= 2.0**30
    case.x[-1] *= 2.0**-30
    y = case.run(implementation(form, "fp8"))
    # There h has a scale per row, here one per 64 or 128 columns of it; and so has x, where it is joined.
    quantized = in_float8 if form == "tiles_w8a8" else partial(in_float8, columns=128)
    by_itself = experts_in_float64(case, quantized=quantized)
    assert max(row_errors(y, by_itself)) < 0.05
    # What the rounding itself costs is 0.06 to 0.07 in the worst of 192 rows, so rows are held to it together.
    exact = experts_in_float64(case)
    assert mean_square(row_errors(y, exact)) < 1.2**2 * mean_square(row_errors(by_itself, exact))


@pytest.mark.parametrize("T", [1, 3, 16, 17, 33, 128, 192])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "shared"),
    [(256, 128, 32, 4, 1), (2048, 512, 256, 8, 1), (2304, 1024, 64, 8, 1), (7168, 2048, 12, 4, 1), (384, 640, 5, 3, 0)],
)
def test_experts(T: int, published: bool, D: int, I: int, E: int, k: int, shared: int) -> None:
    check("tiles_w8a8", T, published, D, I, E, k, shared)


@pytest.mark.parametrize("T", [1, 3, 16, 17, 33, JOINED_TOKENS])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("D", "I", "E", "k", "shared"), [(256, 128, 32, 4, 1), (7168, 2048, 6, 3, 1), (384, 640, 5, 3, 0)]
)
def test_experts_in_two_launches(T: int, published: bool, D: int, I: int, E: int, k: int, shared: int) -> None:
    check("joined_w8a8", T, published, D, I, E, k, shared)


@FORMS
def test_experts_all_tokens_on_the_same_few(form: str) -> None:
    T = 150 if form == "tiles_w8a8" else 64
    case = moe_case_fp8(T, 256, 128, 64, 4, 1, torch.bfloat16, "cuda", published=True)
    case.ids[:, :4] = torch.arange(4, device="cuda")
    assert rmse_ratio(case.run(implementation(form, "fp8")), experts_in_float64(case)) < 0.05


@FORMS
@pytest.mark.parametrize("T", [2, 13, 64])
def test_nan_stays_in_its_row(form: str, T: int) -> None:
    case = moe_case_fp8(T, 256, 128, 32, 4, 1, torch.bfloat16, "cuda")
    case.x[1] = torch.nan
    y = case.run(implementation(form, "fp8"))
    assert y.isnan().all(1).tolist() == [t == 1 for t in range(T)]
    assert y.isfinite().all(1).tolist() == [t != 1 for t in range(T)]


@FORMS
@pytest.mark.parametrize("T", [4, 17, 40])
def test_chained_in_a_graph(form: str, T: int) -> None:
    layers = [moe_case_fp8(T, 512, 256, 64, 8, 1, torch.bfloat16, "cuda", seed=i) for i in range(10)]
    check_chained_in_a_graph(layers, implementation(form, "fp8"))
