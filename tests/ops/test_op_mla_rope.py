"""Op "mla_rope": reference against complex numbers; its kernel under the interpreter, compiled, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.kda_mixer_case import error
from thalweg.ops.attention.mla_rope import MLA_ROPE, MlaRopeDims, reference
from thalweg.ops.registry import Resolver, Where

CPU = Where("cpu", "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_turn_as_complex_numbers_in_place(dtype: torch.dtype) -> None:
    T, H, K, P = 5, 3, 6, 8
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(T, H + 1, K + P + 2, generator=rng).to(dtype)  # with strides of its own
    q_THX, before = wide[:, :H, : K + P], wide.clone()
    positions = torch.tensor([0, 1, 7, 100, 4000])
    frequencies = torch.tensor([1.0, 0.3, 0.02, 1e-4])
    rope = Resolver().resolve(MLA_ROPE, CPU, MlaRopeDims(H=H, K=K, P=P))
    rope(q_THX, positions_T=positions, frequencies_F=frequencies, rope_scale=1.3)

    turn = 1.3 * torch.exp(1j * (positions[:, None, None] * frequencies.double()))
    pairs = torch.view_as_complex(before[:, :H, K : K + P].double().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    tolerance = dict(rtol=2e-4, atol=2e-3) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(q_THX[..., K:].double(), turned, **tolerance)
    wide[:, :H, K : K + P] = before[:, :H, K : K + P]
    assert torch.equal(wide, before)  # nothing beside it was touched


def queries(T: int, H: int, K: int, P: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """With a gap after each token."""
    rng = torch.Generator(device).manual_seed(T)
    wide = torch.randn(T, H * (K + P) + 64, generator=rng, device=device)
    return wide.to(dtype)[:, : H * (K + P)].unflatten(-1, (H, K + P))


def both_forms(q_THX: Tensor, P: int, furthest: int) -> tuple[Tensor, Tensor]:
    """The rotated queries, by the reference and by the kernel."""
    from thalweg.ops.attention.mla_rope import triton

    positions = torch.arange(len(q_THX), device=q_THX.device) * furthest // max(1, len(q_THX) - 1)
    frequencies = 50000 ** -torch.linspace(0, 1, P // 2, device=q_THX.device)
    results = q_THX.clone(), q_THX.clone()
    for op, q in zip((reference.mla_rope, triton.mla_rope), results, strict=True):
        op(q, positions_T=positions, frequencies_F=frequencies, rope_scale=1.3)
    return results


def check_kernel() -> None:
    for T, H, K, P in ((5, 3, 6, 8), (1, 1, 4, 2), (3, 5, 2, 6), (0, 2, 4, 4)):
        expected, found = both_forms(queries(T, H, K, P), P, 4000)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_kernel_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kernel)


@pytest.mark.parametrize("H", [8, 64])
def test_compiles_for_hopper_without_spills(H: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_rope.triton import rotate_kernel

    types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "positions_ptr": "*i64", "frequencies_ptr": "*fp32"}
    types |= {f"{name}_stride_{dim}": "i32" for name in "xy" for dim in "th"} | {"rope_scale": "fp32"}
    constants = {"H": H, "P": 64, "BLOCK_H": H, "BLOCK_P": 64, "PDL": True}
    compiled = compile_sm90(rotate_kernel, types, constants)
    assert compiled.spilled_bytes == 0
    assert compiled.ptx.count("griddepcontrol.wait") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "H"), [(1, 64), (17, 8), (1000, 64), (300, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(T: int, H: int, dtype: torch.dtype) -> None:
    q = queries(T, H, 128, 64, "cuda", dtype)
    expected, found = both_forms(q, 64, 130_000)
    assert torch.equal(found[..., :128], q[..., :128])
    assert error(found, expected.double()) < (3e-3 if dtype == torch.bfloat16 else 1e-5)
