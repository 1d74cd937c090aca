"""Projections of a few tokens in CUDA C++: compiled for Hopper, and when they are chosen. Results: test_gpu_linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from thalweg.ops.linear import LINEAR, LINEAR_ADD, NORM_LINEAR, LinearDims, NormLinearDims
from thalweg.ops.registry import Op, Resolver, Where
from thalweg.ops.toolchain import cuda_build, triton_support

CUDA = pytest.importorskip("thalweg.ops.linear.cuda", exc_type=ImportError)
HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a block may have


SHAPES = [(2304, 12576, 1, 0), (4096, 2304, 0, 1), (1024, 2304, 0, 0), (96, 37, 1, 1)]


@pytest.mark.parametrize(
    ("tokens", "D", "O", "norm", "add"),
    [(t, *shape) for t in (8, 16) for shape in SHAPES] + [(32, 2304, 12576, 1, 0), (32, 2304, 2304, 1, 0)],
)
def test_it_compiles_for_hopper_without_spills(
    tmp_path: Path, tokens: int, D: int, O: int, norm: int, add: int
) -> None:
    cut = CUDA.tiling(-(-O // 132), D, tokens)
    compiled = compile_cuda(CUDA.SOURCE, tmp_path, D=D, TOKENS=tokens, ROWS=cut.rows, NORM=norm, ADD=add)
    assert compiled.spilled_bytes == 0
    assert compiled.static_shared_bytes + cut.shared_bytes <= HOPPER_SHARED


def test_constants_are_those_of_the_source() -> None:
    source = CUDA.SOURCE.read_text()
    assert f"WARPS = {CUDA.WARPS}, " in source
    assert f"MAX_STAGES = {CUDA.MAX_STAGES};" in source


def test_rows_stay_in_one_tile_where_they_fit_and_go_through_a_ring_where_not() -> None:
    assert CUDA.tiling(18, 4096, 16)[:3] == (24, 18, 1)
    assert CUDA.tiling(96, 2304, 16)[:3] == (8, 8, 5)
    assert CUDA.tiling(18, 2304, 32)[:3] == (8, 8, 3)  # larger tiles would not fit the registers
    for D in range(32, 4097, 32):
        for tokens in (8, 16, 32):
            for block_rows in (1, 7, 8, 9, 18, 24, 25, 96, 2000):
                cut = CUDA.tiling(block_rows, D, tokens)
                assert cut.tile_rows <= cut.rows
                assert cut.stages >= 2 or block_rows <= cut.tile_rows
                assert cut.stages <= CUDA.MAX_STAGES
                assert cut.shared_bytes <= CUDA.SHARED


def test_rows_that_are_not_aligned_are_copied() -> None:
    wide, odd = torch.randn(16, 104).bfloat16(), torch.randn(4, 101).bfloat16()
    assert cuda_build.aligned_rows(wide[:, :96]).data_ptr() == wide.data_ptr()
    for x in (odd[:, :96], wide[:, 1:97]):
        copy = cuda_build.aligned_rows(x)
        assert torch.equal(copy, x)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("op", "dims", "table"),
    [
        (LINEAR, LinearDims(D=2304, O=64), {"1-16": "cuda", "17-": "reference"}),
        (LINEAR_ADD, LinearDims(D=2304, O=64), {"1-16": "cuda", "17-": "in_place"}),
        (NORM_LINEAR, NormLinearDims(D=2304, parts=(64,)), {"1-32": "cuda", "33-": "triton"}),
        (NORM_LINEAR, NormLinearDims(D=2336, parts=(64,)), {"1-16": "cuda", "17-": "triton"}),
    ],
)
def test_many_tokens_go_to_the_library(
    op: Op[Any, Any], dims: object, table: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_support, "_compute_capability_major", lambda: 9)
    monkeypatch.setattr(cuda_build, "why_not", lambda where: None)
    resolver = Resolver()
    resolver.resolve(op, Where("cuda", "bfloat16"), dims)
    assert {str(span.tokens): span.name for span in resolver.explain()[0].table} == table


@pytest.mark.parametrize(
    ("D", "dtype", "reason"),
    [
        (100, "bfloat16", "needs D to be a multiple of 32 up to 4096, not 100"),
        (9216, "bfloat16", "needs D to be a multiple of 32 up to 4096, not 9216"),
        (2304, "float32", "needs bfloat16, not float32"),
    ],
)
@pytest.mark.parametrize("op", [LINEAR, NORM_LINEAR, LINEAR_ADD], ids=lambda op: op.name)
def test_what_it_does_not_serve_it_refuses_with_a_reason(op: Op[Any, Any], D: int, dtype: str, reason: str) -> None:
    resolver = Resolver()
    dims = NormLinearDims(D=D, parts=(64,)) if op is NORM_LINEAR else LinearDims(D=D, O=64)
    resolver.resolve(op, Where("cuda", dtype), dims)
    assert dict(resolver.explain()[0].refused)["cuda"] == reason
