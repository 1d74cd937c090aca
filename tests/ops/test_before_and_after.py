"""Forms that serve only if --op asks for them: unfused products, held against what serves otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.interpreted import run_interpreted
from tests.ops.split_norms_case import check_same_bits, split_norms_case
from thalweg.bench.kernels.rearrange import SITES, Site
from thalweg.errors import ConfigError
from thalweg.ops.attention.mla_down_norms import SPLIT_NORMS, SplitNormsDims
from thalweg.ops.attention.mla_rope import MLA_ROPE, MlaRopeDims
from thalweg.ops.linear import NORM_LINEAR, NormLinearDims
from thalweg.ops.norm import RMS_NORM, RmsNormDims
from thalweg.ops.projection import BATCHED_PROJECTION, BatchedProjectionDims
from thalweg.ops.registry import Op, Resolver, Where
from thalweg.ops.residual import SCALED_RESIDUAL_ADD, ScaledResidualAddDims
from thalweg.ops.toolchain import cpu_build

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = (0, 1, 2, 3, 8, 17, 64, 333)


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms of the same library are compared, to the bit: C++ is left out."""
    monkeypatch.setattr(cpu_build, "_loaded", lambda: "left out")


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


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> Tensor:
    """Contiguous, with a gap after each row, every other element of each row, or stored back to front."""
    if layout == "backwards":
        return laid_out(shape[::-1], dtype, "contiguous", device).permute(*reversed(range(len(shape))))
    *first, last = shape
    generator = torch.Generator(device).manual_seed(sum(shape))
    wide = torch.randn(*first, 2 * last + 8, generator=generator, device=device).to(dtype)
    views = {
        "contiguous": wide[..., :last].contiguous(),
        "gaps": wide[..., :last],
        "strided": wide[..., : 2 * last : 2],
    }
    return views[layout]


# Of KDA and of Gated DeltaNet.
@pytest.mark.parametrize("layout", ["contiguous", "gaps", "strided", "backwards"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.where)
def test_every_call_site_of_einops(site: Site, dtype: torch.dtype, layout: str) -> None:
    einops = pytest.importorskip("einops")
    for T in (0, 1, 3, 64) if site.tokens else (0,):
        x = laid_out((T, *site.shape) if site.tokens else site.shape, dtype, layout)
        by_einops, native = einops.rearrange(x, site.pattern, **site.sizes), site.native(x)
        assert torch.equal(by_einops, native)
        # Neither copies where the other gives a view.
        assert (by_einops.data_ptr() == x.data_ptr()) == (native.data_ptr() == x.data_ptr())


def test_a_call_site_whose_native_form_differs_is_found() -> None:
    """What the test above says of a wrong one."""
    einops = pytest.importorskip("einops")
    for site in SITES:
        x = laid_out((3, *site.shape) if site.tokens else site.shape, torch.float32, "contiguous")
        assert not torch.equal(einops.rearrange(x, site.pattern, **site.sizes), site.native(x).flip(-1))


K2 = [(7, 48, 32, 8), (1, 1536, 512, 64), (33, 20, 48, 2), (0, 16, 16, 4)]


@pytest.mark.parametrize("gap", [0, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "Q", "R", "P"), K2)
def test_split_norms_is_a_split_and_its_parts(T: int, Q: int, R: int, P: int, dtype: torch.dtype, gap: int) -> None:
    where = Where("cpu", str(dtype).removeprefix("torch."))
    case = split_norms_case(T, Q, R, P, dtype, gap=gap)
    q, rows, _ = case.run(Resolver().resolve(SPLIT_NORMS, where, SplitNormsDims(Q=Q, R=R, P=P)))
    for part, weight, found in ((case.x[:, :Q], case.q_weight, q), (case.x[:, Q : Q + R], case.kv_weight, rows[:, :R])):
        norm = Resolver().resolve(RMS_NORM, where, RmsNormDims(D=len(weight)))
        assert torch.equal(found, norm(part.contiguous(), weight, 1e-6))
    shared = case.x[:, None, Q + R :].clone()
    rotate = Resolver().resolve(MLA_ROPE, where, MlaRopeDims(H=1, K=0, P=P))
    rotate(shared, positions_T=case.positions, frequencies_F=case.frequencies, rope_scale=case.rope_scale)
    assert torch.equal(rows[:, None, R:], shared)


@pytest.mark.parametrize("shape", [(5, 300), (1, 7168), (33, 37), (0, 8)])
def test_scaled_residual_add_is_two_additions(shape: tuple[int, int]) -> None:
    """In float32: on a CPU, torch rounds the scale to a dtype of 16 bits, and the ends of rows once more than their
    whole vectors. On a GPU it does neither."""
    fused, two = both(SCALED_RESIDUAL_ADD, ScaledResidualAddDims(D=shape[1]), torch.float32)
    residual, a, b = (laid_out((*shape, 3), torch.float32, "contiguous")[..., i].contiguous() for i in range(3))
    assert torch.equal(fused(residual, a, b, 2.827), two(residual, a, b, 2.827))


def check_split_norms_bit_for_bit(device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    for T, Q, R, P in K2:
        for dtype in dtypes:
            for gap in (0, 8):
                check_same_bits(split_norms_case(T, Q, R, P, dtype, device, gap))


def test_split_norms_is_several_launches_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_split_norms_bit_for_bit)


@pytest.mark.gpu
def test_split_norms_is_several_launches_on_a_gpu() -> None:
    check_split_norms_bit_for_bit("cuda", tuple(DTYPES[:2]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(5, 300), (1, 7168), (33, 37), (300, 7168), (0, 8)])
def test_scaled_residual_add_is_two_additions_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    where, dims = Where("cuda", str(dtype).removeprefix("torch.")), ScaledResidualAddDims(D=shape[1])
    fused = Resolver({SCALED_RESIDUAL_ADD.name: "triton"}).resolve(SCALED_RESIDUAL_ADD, where, dims)
    two = Resolver({SCALED_RESIDUAL_ADD.name: "separate"}).resolve(SCALED_RESIDUAL_ADD, where, dims)
    residual, a, b = (laid_out((*shape, 3), dtype, "contiguous", "cuda")[..., i].contiguous() for i in range(3))
    assert torch.equal(fused(residual, a, b, 2.827), two(residual, a, b, 2.827))


def test_unfused_norms_of_kimi_k2_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"'separate' for cpu.*needs cuda, not cpu"):
        both(SPLIT_NORMS, SplitNormsDims(Q=48, R=32, P=8), torch.float32)
