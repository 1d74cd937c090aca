"""The RMS norm kernel: under the interpreter, compiled for Hopper, and (marked gpu) on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.norm import RMS_NORM, RmsNormDims, reference
from thalweg.ops.registry import Resolver, Where


def check_norms() -> None:
    from thalweg.ops.norm.triton.rms import rms_norm

    for shape in ((5, 48), (2, 3, 100), (0, 8), (1, 1)):
        x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    wide = torch.randn(4, 96)
    strided = wide[:, 32:80]
    weight = torch.randn(48)
    torch.testing.assert_close(rms_norm(strided, weight, 1e-5), reference.rms_norm(strided, weight, 1e-5))


def test_norms_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_norms)


def test_compiles_for_hopper_without_spills() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.norm.triton.rms import _rms_norm

    types = {f"{name}_ptr": "*bf16" for name in ("x", "weight", "y")}
    types |= {"x_stride": "i32", "eps": "fp32"}
    compiled = compile_sm90(_rms_norm, types, {"D": 2304, "BLOCK_D": 4096, "PDL": True}, 8)
    assert compiled.spilled_bytes == 0
    assert "griddepcontrol.wait" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 300])
@pytest.mark.parametrize("D", [2304, 512, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(T: int, D: int, dtype: torch.dtype) -> None:
    where = Where("cuda", str(dtype).removeprefix("torch."))
    rms_norm = Resolver({"rms_norm": "triton"}).resolve(RMS_NORM, where, RmsNormDims(D=D))
    x = torch.randn(T, D, device="cuda").to(dtype)
    weight = torch.randn(D, device="cuda").to(dtype)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2e-6
    expected = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("silu", "weight"), [(False, "*bf16"), (True, "*fp32")])
def test_the_gated_norm_compiles_for_hopper_without_spills(silu: bool, weight: str) -> None:
    """Of 32 heads of 128: Kimi-Linear's, and Qwen's with an fp32 weight and SiLU."""
    pytest.importorskip("triton")
    from thalweg.ops.norm.triton.gated import gated_rms_norm_kernel

    types = {**dict.fromkeys(("o_ptr", "gate_ptr", "y_ptr"), "*bf16"), "weight_ptr": weight}
    types |= {"rows": "i32", "o_stride": "i32", "gate_stride": "i32", "eps": "fp32"}
    constants = {"H": 32, "V": 128, "BLOCK_V": 128, "ROWS": 32, "SILU": silu}
    assert compile_sm90(gated_rms_norm_kernel, types, constants).spilled_bytes == 0
