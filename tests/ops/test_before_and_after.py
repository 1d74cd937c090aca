"""Forms that serve only if --op asks for them: unfused products and einops, held against what serves otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg.errors import ConfigError
from thalweg.ops import heads
from thalweg.ops.attention.mla_down_norms import SPLIT_NORMS, SplitNormsDims
from thalweg.ops.heads import MERGE_HEADS, SPLIT_HEADS, HeadsDims
from thalweg.ops.linear import NORM_LINEAR, NormLinearDims
from thalweg.ops.projection import BATCHED_PROJECTION, BatchedProjectionDims
from thalweg.ops.registry import Op, Resolver, Where
from thalweg.ops.residual import SCALED_RESIDUAL_ADD, ScaledResidualAddDims

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = (0, 1, 2, 3, 8, 17, 64, 333)


def both(op: Op[Any, Any], dims: object, dtype: torch.dtype, other: str = "separate") -> tuple[Any, Any]:
    where = Where("cpu", str(dtype).removeprefix("torch."))
    usual, asked = Resolver(), Resolver({op.name: other})
    functions = usual.resolve(op, where, dims), asked.resolve(op, where, dims)
    assert [c.table[0].name for r in (usual, asked) for c in r.explain()] == ["reference", other]
    return functions


def rows(T: int, columns: int, dtype: torch.dtype, contiguous: bool) -> Tensor:
    x = torch.randn(T, columns + 8, generator=torch.Generator().manual_seed(T)).to(dtype)[:, :columns]
    return x.contiguous() if contiguous else x


# The library's sums of a column have one order in parts of whole vectors (16 floats); in narrower ones another.
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("D", "parts"), [(256, (256, 256, 256, 4, 64, 64)), (256, (192, 80)), (256, (1280,)), (96, (32, 32, 32, 1, 8, 8))]
)
def test_norm_linear(D: int, parts: tuple[int, ...], dtype: torch.dtype, contiguous: bool) -> None:
    fused, separate = both(NORM_LINEAR, NormLinearDims(D=D, parts=parts), dtype)
    g = torch.Generator().manual_seed(D)
    w = (torch.randn(sum(parts), D, generator=g) / D**0.5).to(dtype)
    norm = (1 + torch.randn(D, generator=g) / 5).to(dtype)
    for T in TOKENS:
        x = rows(T, D, dtype, contiguous)
        found, expected = separate(x, norm, 1e-5, w), fused(x, norm, 1e-5, w)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 0, atol=2e-6)
        for a, b in zip(found.split(parts, -1), expected.split(parts, -1), strict=True):
            assert a.shape[1] % 16 or torch.equal(a, b)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "O"), [(64, 256), (128, 512), (24, 48)])
def test_batched_projection(R: int, O: int, dtype: torch.dtype, contiguous: bool) -> None:
    batched, separate = both(BATCHED_PROJECTION, BatchedProjectionDims(R=R, O=O), dtype)
    w = torch.randn(2, O, R, generator=torch.Generator().manual_seed(R)).to(dtype)
    for T in TOKENS:
        x = rows(T, 2 * R, dtype, contiguous).unflatten(-1, (2, R))
        found = separate(x, w)
        assert torch.equal(found, batched(x, w))
        assert found[:, 0].stride(-1) == 1


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "X"), [(4, 64), (1, 48), (96, 3)])
def test_heads(H: int, X: int, dtype: torch.dtype, contiguous: bool) -> None:
    pytest.importorskip("einops")
    split, split_by_einops = both(SPLIT_HEADS, HeadsDims(X=X), dtype, "einops")
    merge, merge_by_einops = both(MERGE_HEADS, HeadsDims(X=X), dtype, "einops")
    for T in TOKENS:
        x = rows(T, H * X, dtype, contiguous)
        in_heads = split_by_einops(x)
        assert torch.equal(in_heads, split(x))
        assert in_heads.shape == (T, H, X)
        assert in_heads.data_ptr() == x.data_ptr()
        assert torch.equal(merge_by_einops(in_heads), x)
        assert torch.equal(merge(in_heads), x)


def test_without_einops_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="einops is not installed; pip install einops"):
        Resolver({"split_heads": "einops"}).resolve(SPLIT_HEADS, Where("cpu", "float32"), HeadsDims(X=8))


def test_pieces_of_kimi_k2_on_a_cpu() -> None:
    add, two = both(SCALED_RESIDUAL_ADD, ScaledResidualAddDims(D=300), torch.float32)
    residual, a, b = torch.randn(3, 5, 300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two(residual, a, b, 2.827), add(residual, a, b, 2.827))
    with pytest.raises(ConfigError, match=r"'separate' for cpu.*needs cuda, not cpu"):
        both(SPLIT_NORMS, SplitNormsDims(Q=48, R=32), torch.float32)
