"""Op "split_norms": reference, kernel under the interpreter, compiled for Hopper, and (marked gpu) on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.attention.mla_down_norms import SPLIT_NORMS, SplitNormsDims, reference
from thalweg.ops.norm import RMS_NORM, RmsNormDims
from thalweg.ops.registry import Resolver, Where


def inputs(T: int, Q: int, R: int, P: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    rng = torch.Generator(device).manual_seed(T)
    x, q_weight, kv_weight = (
        torch.randn(*shape, generator=rng, device=device) for shape in ((T, Q + R + P), (Q,), (R,))
    )
    return (x * 3).to(dtype), q_weight.to(dtype), kv_weight.to(dtype)


def test_reference_against_float64() -> None:
    x, q_weight, kv_weight = inputs(5, 24, 16, 8, torch.float32)
    q, latent, shared = reference.split_norms(x, q_weight, kv_weight, 1e-6)
    for part, weight, y in ((x[:, :24], q_weight, q), (x[:, 24:40], kv_weight, latent)):
        truth = part.double() / (part.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=1e-7)
    assert torch.equal(shared, x[:, 40:])
    assert shared.data_ptr() == x[:, 40:].data_ptr()


def check_split_norms() -> None:
    from thalweg.ops.attention.mla_down_norms.triton import split_norms, split_norms_in_two_launches

    for T, Q, R, P in ((5, 48, 20, 8), (3, 20, 48, 1), (0, 16, 16, 4), (1, 1, 1, 0)):
        x, q_weight, kv_weight = inputs(T, Q, R, P, torch.float32)
        expected = reference.split_norms(x, q_weight, kv_weight, 1e-5)
        for op in (split_norms, split_norms_in_two_launches):
            for out, truth in zip(op(x, q_weight, kv_weight, 1e-5), expected, strict=True):
                torch.testing.assert_close(out, truth)


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_split_norms)


def test_compiles_for_hopper_without_spills() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_down_norms.triton import _split_norms

    types = {f"{name}_ptr": "*bf16" for name in ("x", "q_weight", "kv_weight", "q", "latent")}
    types |= {"x_stride": "i32", "eps": "fp32"}
    constants = {"Q": 1536, "R": 512, "BLOCK_Q": 2048, "BLOCK_R": 512, "PDL": True}
    compiled = compile_sm90(_split_norms, types, constants, 4)
    assert compiled.spilled_bytes == 0
    assert compiled.ptx.count("griddepcontrol.wait") == 2  # one in each branch


@pytest.mark.parametrize(("Q", "R"), [(16385, 512), (512, 0)])
def test_refuses_parts_that_one_program_cannot_hold(Q: int, R: int) -> None:
    resolver = Resolver()
    resolver.resolve(SPLIT_NORMS, Where("cuda", "bfloat16"), SplitNormsDims(Q=Q, R=R))
    (choice,) = resolver.explain()
    assert [span.name for span in choice.table] == ["reference"]
    assert str(max(Q, R)) in choice.refused[0][1]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 300])
@pytest.mark.parametrize(("Q", "R", "P"), [(1536, 512, 64), (100, 300, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(T: int, Q: int, R: int, P: int, dtype: torch.dtype) -> None:
    from thalweg.ops.attention.mla_down_norms.triton import split_norms, split_norms_in_two_launches

    arguments = (*inputs(T, Q, R, P, dtype, "cuda"), 1e-6)
    for n in (Q, R):
        torch.full((T, n), torch.nan, device="cuda", dtype=dtype)  # freed: the outputs are likely to be made of it
    fused = split_norms(*arguments)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2e-6
    for y, expected in zip(fused, reference.split_norms(*arguments), strict=True):
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=1e-6)
    assert all(map(torch.equal, fused, split_norms_in_two_launches(*arguments)))
    # Where a part takes as many warps by itself, the model's own norm gives these bits too.
    rms_norm = Resolver({"rms_norm": "triton"}).resolve(RMS_NORM, Where("cuda", "bfloat16"), RmsNormDims(D=Q))
    if Q > R:
        assert torch.equal(fused[0], rms_norm(arguments[0][:, :Q], arguments[1], 1e-6))
