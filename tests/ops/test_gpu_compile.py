"""Kernels compiled together are ready afterwards and have not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thalweg.ops.toolchain.triton_compile import compiled_together

pytestmark = pytest.mark.gpu


def test_compiles_without_running_and_once() -> None:
    import triton

    from thalweg.ops.norm.triton.rms import rms_norm

    x = torch.randn(3, 1776, device="cuda", dtype=torch.bfloat16)  # a width that nothing else has
    weight = torch.ones(1776, device="cuda", dtype=torch.bfloat16)
    compiled: list[Any] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs)
    try:
        with compiled_together():
            assert not rms_norm(x, weight, 1e-6).any()
            assert not rms_norm(x, weight, 1e-6).any()
        assert len(compiled) == 1
        assert rms_norm(x, weight, 1e-6).any()
        assert len(compiled) == 1
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
