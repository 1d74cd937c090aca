"""Projections of a few tokens in CUDA C++: run on the host, compiled for Hopper, and when they are chosen. Results
of the device: test_gpu_linear and test_gpu_linear_fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.fp8_linear_case import Fp8Case, draw, expected
from tests.ops.moe_case import rmse_ratio
from tests.ops.run_on_host import HostKernel
from thalweg.ops.linear import LINEAR, LINEAR_ADD, NORM_LINEAR, LinearDims, NormLinearDims
from thalweg.ops.registry import Op, Resolver, Where
from thalweg.ops.toolchain import cuda_build, triton_support

CUDA = pytest.importorskip("thalweg.ops.linear.cuda", exc_type=ImportError)
FP8 = pytest.importorskip("thalweg.ops.linear.fp8.cuda", exc_type=ImportError)
HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a block may have


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDA, "cuda_kernel", HostKernel)


def check(case: Fp8Case, *, fp8: bool, norm: bool, add: bool) -> None:
    w = (case.q_OD, case.scale_OB) if fp8 else (case.rest_RD,)
    T, O = len(case.x_TD), len(w[0])
    residual = torch.randn(T, O + 3).bfloat16()[:, :O] if add else None
    out = torch.full((T, O + 5), torch.nan).bfloat16()
    multiply = FP8.few_tokens if fp8 else CUDA.few_tokens
    y = multiply(case.x_TD, *w, (case.norm_D, 1e-5) if norm else None, residual, out[:, :O])
    assert y.data_ptr() == out.data_ptr()
    wanted = expected(case, norm=norm, rest=True)
    wanted = wanted[:, : len(case.q_OD)] if fp8 else wanted[:, len(case.q_OD) :]
    assert rmse_ratio(y, wanted if residual is None else wanted + residual.double()) < 0.004
    assert out[:, O:].isnan().all()


@pytest.mark.parametrize(
    ("T", "D", "O", "norm", "add", "shared"),
    [
        (1, 7168, 24, True, False, None),  # two passes
        (5, 384, 24, False, True, None),
        (8, 640, 40, True, False, None),
        (9, 2560, 104, True, False, 112),  # in KiB: too little for one pass, and the second is shorter
        (16, 2304, 72, True, True, None),
    ],
)
def test_float8(
    T: int, D: int, O: int, norm: bool, add: bool, shared: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shared is not None:
        monkeypatch.setattr(FP8, "SHARED", shared * 1024)
        assert FP8.tiling(32, D, 16, 2).columns == 1536
    check(draw(T, D, O, torch.bfloat16), fp8=True, norm=norm, add=add)


@pytest.mark.parametrize(
    ("T", "D", "O", "norm", "add"),
    [
        (1, 4128, 130, True, True),  # two passes
        (2, 288, 37, True, True),
        (11, 992, 29, False, False),
        (17, 2304, 20, True, False),
    ],
)
def test_bfloat16(T: int, D: int, O: int, norm: bool, add: bool) -> None:
    norm_dtype = torch.float32 if T == 1 else None
    check(draw(T, D, 0, torch.bfloat16, rest=O, norm_dtype=norm_dtype), fp8=False, norm=norm, add=add)


@pytest.mark.parametrize(
    ("D", "O", "rest", "norm_dtype"),
    [
        (7168, 24, 2, torch.bfloat16),
        (8192, 16, 0, None),  # passes of as many columns
        (640, 40, 0, torch.float32),
        (384, 24, 3, torch.bfloat16),
        (1536, 24, 0, None),
    ],
)
def test_one_token_has_the_bits_it_has_among_others(D: int, O: int, rest: int, norm_dtype: torch.dtype | None) -> None:
    case = draw(2, D, O, torch.bfloat16, rest=rest, norm_dtype=norm_dtype)
    norm = None if norm_dtype is None else (case.norm_D, 1e-5)
    more = dict(rest_RD=case.rest_RD if rest else None, residual_TO=case.residual_TO if norm is None else None)
    both = FP8.few_tokens(case.x_TD, case.q_OD, case.scale_OB, norm, **more, out_TO=torch.empty(2, O + rest).bfloat16())
    more["residual_TO"] = more["residual_TO"] if norm else case.residual_TO[1:]
    alone = FP8.few_tokens(
        case.x_TD[1:], case.q_OD, case.scale_OB, norm, **more, out_TO=torch.empty(1, O + rest).bfloat16()
    )
    assert torch.equal(alone, both[1:])


def test_no_tokens_give_no_rows() -> None:
    case = draw(0, 128, 24, torch.bfloat16, rest=3)
    assert FP8.few_tokens(case.x_TD, case.q_OD, case.scale_OB).shape == (0, 24)
    assert CUDA.few_tokens(case.x_TD, case.rest_RD).shape == (0, 3)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize(("D", "rest"), [(256, 35), (256, 1), (384, 5), (7168, 2)])  # of 3 blocks: 2 rows each fit
def test_a_rest_stands_behind_float8(T: int, D: int, rest: int) -> None:
    case = draw(T, D, 24, torch.bfloat16, rest=rest)
    weights = (case.q_OD, case.scale_OB, case.rest_RD)
    for y, wanted in (
        (FP8.norm_linear_fp8(case.x_TD, case.norm_D, 1e-5, *weights), expected(case, norm=True, rest=True)),
        (FP8.linear_fp8(case.x_TD, *weights), expected(case, rest=True)),
    ):
        assert rmse_ratio(y[:, :24], wanted[:, :24]) < 0.004
        assert rmse_ratio(y[:, 24:], wanted[:, 24:]) < 0.008  # of as little as one sum


@pytest.mark.parametrize(
    ("D", "O", "norm", "add", "tokens"),
    [
        *((7168, 163840, 1, 0, tokens) for tokens in (8, 16)),
        *((2304, 12576, 1, 0, tokens) for tokens in (8, 16)),
        *((4096, 2304, 0, 1, tokens) for tokens in (8, 16)),
        (96, 37, 1, 1, 8),
        (2304, 6720, 1, 0, 32),
    ],
)
def test_it_compiles_for_hopper_without_spills(
    tmp_path: Path, D: int, O: int, norm: int, add: int, tokens: int
) -> None:
    cut = CUDA.tiling(-(-O // 132), D, tokens, norm_bytes=2 * norm)
    macros = dict(D=D, PASS=cut.columns, WARPS=CUDA.WARPS, TOKENS=tokens, ROWS=cut.rows, NORM=norm, ADD=add, GATED=0)
    compiled = compile_cuda(CUDA.SOURCE, tmp_path, **macros)
    assert compiled.spilled_bytes == 0
    assert compiled.static_shared_bytes + cut.shared_bytes <= HOPPER_SHARED


@pytest.mark.parametrize(
    ("D", "O", "norm", "add"),
    [(7168, 2112, 1, 0), (18432, 7168, 0, 1), (5120, 16384, 2, 0), (256, 7168, 0, 0), (2048, 12288, 2, 0)],
)
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_float8_compiles_for_hopper_without_spills(
    tmp_path: Path, D: int, O: int, norm: int, add: int, tokens: int
) -> None:
    each, one, tokens = 0 if add else 1, tokens == 1 and FP8.shares_one(D, 2 * norm), max(tokens, 8)
    cut = FP8.tiling(8 * -(-O // 8 // 132), D, tokens, 2 * norm, each, one)
    warps = FP8.warps(tokens, -(-D // cut.columns))
    macros = dict(D=D, PASS=cut.columns, WARPS=warps, TOKENS=tokens, NORM=norm, ADD=add)
    macros |= dict(REST=64 * each, REST_EACH=each, ONE=int(one))
    compiled = compile_cuda(FP8.SOURCE, tmp_path, **macros)
    assert compiled.spilled_bytes == 0
    assert compiled.static_shared_bytes + cut.shared_bytes <= HOPPER_SHARED


def test_constants_are_those_of_the_sources() -> None:
    assert f"MAX_STAGES = {CUDA.MAX_STAGES};" in CUDA.SOURCE.read_text()
    assert f"MAX_STAGES = {FP8.MAX_STAGES}, BUFFERS = {FP8.BUFFERS}, " in FP8.SOURCE.read_text()


@pytest.mark.parametrize("fp8", [False, True])
def test_any_shape_is_cut_into_what_fits(fp8: bool) -> None:
    for D in (128, 4096, 4608, 7168, 17408, 18432, 32768):
        for tokens in (8, 16):
            for block_rows in (8, 16, 24, 56, 1248, 1992):
                module = FP8 if fp8 else CUDA
                cut = module.tiling(block_rows, D, tokens, norm_bytes=0 if D > 16384 else 4)
                assert cut.columns == D or cut.columns % module.GRANULE == 0
                assert cut.stages >= 2 or (block_rows <= cut.tile_rows and cut.columns == D)
                assert cut.stages <= module.MAX_STAGES
                assert cut.shared_bytes <= module.SHARED


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
        (
            NORM_LINEAR,
            NormLinearDims(D=7168, parts=(64,), norm_fp32=True),
            {"1-8": "cuda", "9-64": "splits", "65-": "triton"},
        ),
        (LINEAR, LinearDims(D=4096, O=2048), {"1-16": "cuda", "17-32": "matrix", "33-": "reference"}),
        (LINEAR, LinearDims(D=2048, O=248320), {"1-16": "cuda", "17-128": "matrix", "129-": "reference"}),
        (NORM_LINEAR, NormLinearDims(D=4096, parts=(12352,)), {"1-16": "cuda", "17-32": "matrix", "33-": "triton"}),
        (LINEAR_ADD, LinearDims(D=12288, O=4096), {"1-8": "cuda", "9-32": "matrix", "33-": "in_place"}),
        (NORM_LINEAR, NormLinearDims(D=2048, parts=(9216,)), {"1-32": "cuda", "33-": "triton"}),
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
        (100, "bfloat16", "needs D to be a multiple of 32 up to 32768, not 100"),
        (65536, "bfloat16", "needs D to be a multiple of 32 up to 32768, not 65536"),
        (2304, "float32", "needs bfloat16, not float32"),
    ],
)
@pytest.mark.parametrize("op", [LINEAR, NORM_LINEAR, LINEAR_ADD], ids=lambda op: op.name)
def test_what_it_does_not_serve_it_refuses_with_a_reason(op: Op[Any, Any], D: int, dtype: str, reason: str) -> None:
    resolver = Resolver()
    dims = NormLinearDims(D=D, parts=(64,)) if op is NORM_LINEAR else LinearDims(D=D, O=64)
    resolver.resolve(op, Where("cuda", dtype), dims)
    assert dict(resolver.explain()[0].refused)["cuda"] == reason
