"""Op "split_norms": reference, kernel under the interpreter, compiled for Hopper, and (marked gpu) on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.kda_mixer_case import error
from tests.ops.split_norms_case import check_same_bits, split_norms_case
from thalweg.ops.attention.mla_down_norms import SPLIT_NORMS, SplitNormsDims, reference
from thalweg.ops.norm import RMS_NORM, RmsNormDims
from thalweg.ops.registry import Resolver, Where


def test_reference_against_float64() -> None:
    case = split_norms_case(5, 24, 16, 8, torch.float32, gap=3)
    case.positions = case.positions % 1000
    q, rows, others = case.run(reference.split_norms)
    for part, weight, y in ((case.x[:, :24], case.q_weight, q), (case.x[:, 24:40], case.kv_weight, rows[:, :16])):
        truth = part.double() / (part.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=1e-7)
    turn = 1.3 * torch.exp(1j * (case.positions[:, None] * case.frequencies.double()))
    pairs = torch.view_as_complex(case.x[:, 40:].double().unflatten(-1, (-1, 2)).contiguous())
    torch.testing.assert_close(rows[:, 16:].double(), torch.view_as_real(pairs * turn).flatten(1), rtol=0, atol=2e-3)
    assert others.isnan().all()


def test_without_queries_of_low_rank() -> None:
    case = split_norms_case(5, 0, 16, 8, torch.float32)
    q, rows, _ = case.run(reference.split_norms)
    assert q.shape == (5, 0)
    assert not rows.isnan().any()


@pytest.mark.parametrize("Q", [0, 24])
def test_without_positions_the_shared_part_is_written_as_it_is(Q: int) -> None:
    case = split_norms_case(5, Q, 16, 7, torch.float32, rotated=False)
    q, rows, others = case.run(reference.split_norms)
    assert q.shape == (5, Q)
    assert torch.equal(rows[:, 16:], case.x[:, Q + 16 :])
    assert others.isnan().all()


def check_split_norms() -> None:
    from thalweg.ops.attention.mla_down_norms.triton import split_norms, split_norms_by_parts

    for T, Q, R, P in ((5, 48, 20, 8), (3, 20, 48, 2), (0, 16, 16, 4), (1, 1, 1, 6), (4, 0, 20, 4)):
        for rotated in (True, False):
            case = split_norms_case(T, Q, R, P, torch.float32, gap=8, rotated=rotated)
            for op in (split_norms, split_norms_by_parts):
                for out, truth in zip(case.run(op), case.run(reference.split_norms), strict=True):
                    torch.testing.assert_close(out, truth, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_split_norms)


@pytest.mark.parametrize(("Q", "rotated"), [(1536, True), (0, True), (0, False)])
def test_compiles_for_hopper_without_spills(Q: int, rotated: bool) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_down_norms.triton import _split_norms

    types = {f"{name}_ptr": "*bf16" for name in ("x", "q_weight", "kv_weight", "q", "blocks")}
    types |= {"positions_ptr": "*i64", "block_rows_ptr": "*i64", "frequencies_ptr": "*fp32"}
    types |= {"x_stride": "i32", "eps": "fp32", "rope_scale": "fp32"}
    blocks = {"BLOCK_Q": 2048, "BLOCK_R": 512, "BLOCK_P": 64}
    compiled = compile_sm90(
        _split_norms, types, {"Q": Q, "R": 512, "P": 64, **blocks, "ROTATED": rotated, "PDL": True}, 4
    )
    assert compiled.spilled_bytes == 0
    assert compiled.ptx.count("griddepcontrol.wait") == 3  # one in each branch


@pytest.mark.parametrize(("Q", "R", "P"), [(16385, 512, 64), (512, 0, 64), (512, 512, 20000)])
def test_refuses_parts_that_one_program_cannot_hold(Q: int, R: int, P: int) -> None:
    resolver = Resolver()
    resolver.resolve(SPLIT_NORMS, Where("cuda", "bfloat16"), SplitNormsDims(Q=Q, R=R, P=P))
    (choice,) = resolver.explain()
    assert [span.name for span in choice.table] == ["reference"]
    assert str(max(Q, R, P)) in dict(choice.refused)["triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4, 8, 16, 32, 64, 300])
@pytest.mark.parametrize(("Q", "R", "P"), [(1536, 512, 64), (100, 300, 6), (0, 512, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(T: int, Q: int, R: int, P: int, dtype: torch.dtype) -> None:
    from thalweg.ops.attention.mla_down_norms.triton import split_norms

    case = split_norms_case(T, Q, R, P, dtype, "cuda", gap=8)
    torch.full((T, max(1, Q)), torch.nan, device="cuda", dtype=dtype)  # freed: q is likely to be made of it
    fused, expected = case.run(split_norms), case.run(reference.split_norms)
    tolerance = 3e-3 if dtype == torch.bfloat16 else 1e-5
    assert not Q or error(fused[0], expected[0].double()) < tolerance
    assert error(fused[1], expected[1].double()) < tolerance
    check_same_bits(case)
    # Where a part takes as many warps by itself, the model's own norm gives these bits too.
    if Q > R:
        rms_norm = Resolver({"rms_norm": "triton"}).resolve(RMS_NORM, Where("cuda", "bfloat16"), RmsNormDims(D=Q))
        assert torch.equal(fused[0], rms_norm(case.x[:, :Q], case.q_weight, 1e-6))


@pytest.mark.gpu
def test_padding_rows_share_the_sink() -> None:
    from thalweg.ops.attention.mla_down_norms.triton import split_norms

    case = split_norms_case(8, 1536, 512, 64, torch.bfloat16, "cuda")
    expected = case.run(split_norms)
    case.block_rows[5:] = 0
    q, rows, others = case.run(split_norms)
    assert torch.equal(q, expected[0])
    assert torch.equal(rows[:5], expected[1][:5])
    assert others.isnan().all()
