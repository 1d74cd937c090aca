"""Projections by the library with norms in Triton, under the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.ops.interpreted import run_interpreted
from thalweg.ops.linear import NORM_LINEAR, NormLinearDims, reference
from thalweg.ops.registry import Resolver, Where


def check_ops() -> None:
    from thalweg.ops.linear.triton.library import norm_linear

    g = torch.Generator().manual_seed(0)
    for T, D, O in ((0, 64, 37), (1, 64, 37), (17, 96, 8)):
        x, w = torch.randn(T, D + 5, generator=g)[:, :D], torch.randn(O, D, generator=g) / D**0.5
        norm = 1 + torch.randn(D, generator=g) / 5
        expected = reference.norm_linear(x, norm, 1e-5, w)
        torch.testing.assert_close(norm_linear(x, norm, 1e-5, w), expected, rtol=1e-5, atol=1e-4)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_ops)


def test_refuses_with_a_reason() -> None:
    resolver = Resolver()
    resolver.resolve(NORM_LINEAR, Where("cpu", "float32"), NormLinearDims(D=64, parts=(48, 16)))
    (choice,) = resolver.explain()
    assert "triton" not in [span.name for span in choice.table]
    assert ("triton", "needs cuda, not cpu") in choice.refused
