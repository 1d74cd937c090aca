"""Kernels of gated attention: under the interpreter against float64, and compiled for Hopper."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import Compiled, compile_sm90
from tests.ops.gqa_case import GqaCase, GqaShape, assert_near
from tests.ops.interpreted import run_interpreted
from thalweg.ops.attention.gqa import GQA_MIXER_DECODE, GQA_PREPARE, GqaDims
from thalweg.ops.registry import Resolver, Where
from thalweg.runner.graphs import buckets

SHAPES = [GqaShape(6, 2, 32, 8, 16), GqaShape(4, 4, 16, 16, 1), GqaShape(5, 1, 64, 2, 4)]
CONTEXTS = [0, 1, 30, 31, 32, 63, 150]  # tokens cached before a decode row


def check_float32() -> None:
    from thalweg.ops.attention.gqa import triton

    for shape in SHAPES:
        case = GqaCase(shape, CONTEXTS, [1] * len(CONTEXTS), scale=1.1)
        q, expected = case.check_prepare(triton.gqa_prepare, 2e-5), case.truth()[1]
        for processors in (1, 20):  # one part of each context, and several of which some are empty
            triton.multiprocessors = lambda device, n=processors: n
            assert_near(case.decode(triton.gqa_decode, q), expected, 2e-5)


def check_bfloat16() -> None:
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(SHAPES[0], CONTEXTS, [1] * len(CONTEXTS), torch.bfloat16)
    q = case.check_prepare(triton.gqa_prepare, 2**-6)  # the interpreter truncates to bf16
    assert_near(case.decode(triton.gqa_decode, q), case.truth()[1], 2**-5)


def check_prompts_and_positions() -> None:
    from thalweg.ops.attention.gqa import triton

    GqaCase(SHAPES[0], [0, 5, 3], [7, 0, 20]).check_prepare(triton.gqa_prepare, 2e-5)
    GqaCase(SHAPES[0], [0], [3], first_position=200_000).check_prepare(triton.gqa_prepare, 1e-4)
    GqaCase(SHAPES[0], [2], [0]).prepare(triton.gqa_prepare)


def check_scores_far_apart() -> None:
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(SHAPES[0], [100, 3], [1, 1], spread=12.0)
    q = case.prepare(triton.gqa_prepare)
    assert_near(case.decode(triton.gqa_decode, q), case.truth()[1], 2e-4)


def check_rows_that_share_the_sink() -> None:
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(SHAPES[0], [40, 9, 3, 0], [1] * 4)
    expected = case.decode(triton.gqa_decode, case.prepare(triton.gqa_prepare))
    padded = GqaCase(SHAPES[0], [40, 9, 3, 0], [1] * 4)
    padded.rows[2:], padded.tables[2:] = 0, 0
    q = padded.prepare(triton.gqa_prepare)
    for n in (0, 1):
        lens = torch.tensor([41, 10, n, n], dtype=torch.int32)
        out = triton.gqa_decode(q, padded.proj, **padded.blocks, context_lens_B=lens)
        assert torch.equal(out[:2], expected[:2])
        assert out.isfinite().all()
    empty = triton.gqa_decode(q[:0], padded.proj[:0], **padded.blocks, context_lens_B=lens[:0])
    assert empty.shape == (0, 6 * 32)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(
        check_float32,
        check_bfloat16,
        check_prompts_and_positions,
        check_scores_far_apart,
        check_rows_that_share_the_sink,
    )


TYPES = {
    **{f"{name}_ptr": "*fp32" for name in ("q_norm", "k_norm", "frequencies", "parts", "sums")},
    **{f"{name}_ptr": "*i64" for name in ("positions", "rows")},
    **{f"{name}_ptr": "*i32" for name in ("tables", "lens")},
    **dict.fromkeys(("eps", "rope_scale", "scale"), "fp32"),
    **dict.fromkeys(("proj_stride", "table_stride", "splits"), "i32"),
}


def compiled(kernel: object, dtype: str, constants: dict[str, int], num_warps: int, num_stages: int = 3) -> Compiled:
    names = {p.name: p for p in kernel.params}  # type: ignore[attr-defined]
    types = {n: TYPES.get(n, f"*{dtype}") for n, p in names.items() if not p.is_constexpr}
    constants = {n: x for n, x in constants.items() if n in names}
    result = compile_sm90(kernel, types, constants, num_warps, num_stages)
    assert result.spilled_bytes == 0
    assert result.shared_bytes <= 227 * 1024
    return result


@pytest.mark.parametrize(("H", "G", "dtype"), [(16, 2, "bf16"), (16, 4, "bf16"), (24, 4, "bf16"), (16, 2, "fp32")])
def test_kernels_compile_for_hopper_without_spills(H: int, G: int, dtype: str) -> None:
    """Heads of 256, of which 64 are rotated, in blocks of 64, as published models have them."""
    pytest.importorskip("triton")
    from thalweg.ops.attention.gqa import triton

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    shape = dict(H=H, G=G, K=256, S=64)
    options = triton.prepare_options(H // G, 256)
    prepare = compiled(triton.prepare_kernel, dtype, {**shape, "HALF": 32, **options}, options["num_warps"])
    assert "cos.approx" not in prepare.ptx  # wrong for angles of thousands of turns
    options = triton.attend_options(H, G, torch_dtype)
    compiled(triton.attend_kernel, dtype, {**shape, **options}, options["num_warps"], options["num_stages"])
    for splits in (1, triton.MAX_SPLITS):
        compiled(triton.join_kernel, dtype, {**shape, "SPLITS": splits}, triton.JOIN_WARPS)


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        (GqaDims(H=4, G=2, K=96, R=24, S=64), "a power of two from 16 to 256, not 96"),
        (GqaDims(H=4, G=2, K=8, R=8, S=64), "a power of two from 16 to 256, not 8"),
        (GqaDims(H=4, G=2, K=64, R=24, S=24), "blocks of a power of two, not 24"),
    ],
)
def test_other_shapes_go_to_the_reference_and_say_why(dims: GqaDims, reason: str) -> None:
    for op in (GQA_PREPARE, GQA_MIXER_DECODE):
        resolver = Resolver()
        resolver.resolve(op, Where("cuda", "bfloat16"), dims)
        (choice,) = resolver.explain()
        assert choice.table[0].name == "reference"
        assert reason in dict(choice.refused)["triton"]


def test_splits_fill_the_device_and_no_more() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.gqa.triton import splits_for

    assert [splits_for(B, 2, 132) for B in (1, 2, 4, 5, 8, 32, 66, 128, 1000)] == [64, 64, 32, 16, 16, 4, 2, 1, 1]


def test_no_batch_needs_a_kernel_that_the_sizes_of_graphs_do_not() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.gqa.triton import splits_for

    for G in (1, 2, 4):
        for most in range(1, 257):
            of_sizes = {splits_for(size, G, 132) for size in buckets(most)}
            assert {splits_for(B, G, 132) for B in range(1, most + 1)} <= of_sizes, most
