"""Op "scaled_residual_add": reference, kernel under the interpreter, compiled for Hopper, and (marked gpu) on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.residual import SCALED_RESIDUAL_ADD, ScaledResidualAddDims, reference

SCALE = 2.827  # Kimi-K2's


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    rng = torch.Generator(device).manual_seed(0)
    return tuple((torch.randn(shape, generator=rng, device=device) * 3).to(dtype) for _ in range(3))


def test_reference_rounds_before_the_residual() -> None:
    residual, a, b = inputs((7, 65), torch.bfloat16)
    y = reference.scaled_residual_add(residual, a, b, SCALE)
    inner = (a.double() + SCALE * b.double()).bfloat16()
    assert torch.equal(y, (residual.double() + inner.double()).bfloat16())
    once = (residual.double() + a.double() + SCALE * b.double()).bfloat16()
    assert not torch.equal(y, once)


def check_scaled_residual_add() -> None:
    from thalweg.ops.residual.triton import scaled_residual_add

    for shape in ((5, 48), (3, 700), (0, 8), (1, 1)):
        residual, a, b = inputs(shape, torch.float32)
        y = scaled_residual_add(residual, a, b, SCALE)
        torch.testing.assert_close(y, residual + (a + SCALE * b))
        whole = [x.round() for x in (residual, a, b)]  # exact in every order
        assert torch.equal(scaled_residual_add(*whole, 2.5), reference.scaled_residual_add(*whole, 2.5))


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_scaled_residual_add)


def test_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.residual.triton import BLOCK, _scaled_residual_add

    types = {f"{name}_ptr": "*bf16" for name in ("residual", "a", "b", "y")} | {"scale": "fp32", "size": "i32"}
    compiled = compile_sm90(_scaled_residual_add, types, {"BLOCK": BLOCK, "PDL": True})
    assert compiled.spilled_bytes == 0
    assert compiled.ptx.count("fma.rn.f32") == BLOCK // 128
    assert compiled.ptx.count("ld.global.v4.b32") == 3
    before, _ = compiled.ptx.split("griddepcontrol.wait", 1)
    assert "ld.global" not in before


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4, 8, 16, 32, 64, 300])
@pytest.mark.parametrize("D", [7168, 2304, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_bit_for_bit(T: int, D: int, dtype: torch.dtype) -> None:
    where, dims = Where("cuda", str(dtype).removeprefix("torch.")), ScaledResidualAddDims(D=D)
    op = Resolver({"scaled_residual_add": "triton"}).resolve(SCALED_RESIDUAL_ADD, where, dims)
    residual, a, b = inputs((T, D), dtype, "cuda")
    torch.full((T, D), torch.nan, device="cuda", dtype=dtype)  # freed: the output is likely to be made of it
    assert torch.equal(op(residual, a, b, SCALE), reference.scaled_residual_add(residual, a, b, SCALE))
