"""The decode mixer of an MLA layer: reference, kernels under the interpreter, and kernels compiled for Hopper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90, descriptor
from tests.ops.interpreted import run_interpreted
from tests.ops.mla_mixer_case import check_mla_decode, check_mla_mixer, mla_mixer_case
from thalweg.ops.attention.mla_mixer import MLA_MIXER_DECODE, MlaMixerDims
from thalweg.ops.attention.mla_mixer.reference import mla_decode as rotated_reference
from thalweg.ops.attention.mla_mixer.reference import mla_mixer_decode as reference
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain import triton_support


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_reference(spread: float) -> None:
    case = mla_mixer_case([5, 1, 9, 8], 3, 8, 12, 4, 10, 4, torch.float32, spread=spread)
    check_mla_mixer(reference, case, 1e-5)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_rotated_reference(spread: float) -> None:
    case = mla_mixer_case([5, 1, 9, 8], 3, 8, 12, 4, 10, 4, torch.float32, spread=spread)
    check_mla_decode(rotated_reference, case, 1e-5)


def check_rotated_kernels() -> None:
    from thalweg.ops.attention.mla_mixer.triton.mixer import mla_decode

    for lens, H, block_size, spread in (
        ([150, 1, 70], 3, 16, 1.0),
        ([15, 16, 17, 63, 64, 65], 2, 24, 1.0),
        ([300], 40, 64, 30.0),  # more heads than a program takes
        ([7] * 18, 1, 64, 1.0),  # more tokens than a tile
    ):
        case = mla_mixer_case(lens, H, 16, 32, 16, 16, block_size, torch.float32, spread=spread)
        check_mla_decode(mla_decode, case, 2e-5)


def check_rotation_where_it_is_absorbed() -> None:
    """It is op mla_rope's, bit for bit: that of position 0 changes nothing."""
    from thalweg.ops.attention.mla_mixer.triton.mixer import mla_decode
    from thalweg.ops.attention.mla_rope.triton import mla_rope

    case = mla_mixer_case([40, 70, 3, 9], 5, 16, 32, 16, 16, 16, torch.float32)
    fused = case.copy().run_rotated(mla_decode)
    rotation = dict(positions_T=case.positions, frequencies_F=case.frequencies, rope_scale=case.rope_scale)
    mla_rope(case.queries.unflatten(-1, (5, 32)), **rotation)
    at_0 = case.run_rotated(mla_decode, positions_B=torch.zeros_like(case.positions), rope_scale=1.0)
    assert torch.equal(fused, at_0)


def check_kernels() -> None:
    from thalweg.ops.attention.mla_mixer.triton.mixer import mla_mixer_decode

    for lens, block_size, spread in (
        ([150, 1, 70], 16, 1.0),
        ([5, 64, 65, 200, 1, 129], 24, 1.0),  # more than four sequences: the tiled form of the last kernel
        ([300], 64, 30.0),
    ):
        case = mla_mixer_case(lens, 3, 16, 32, 16, 16, block_size, torch.float32, spread=spread)
        check_mla_mixer(mla_mixer_decode, case, 2e-5)


def check_rows_that_share_the_sink() -> None:
    from thalweg.ops.attention.mla_mixer.triton.mixer import mla_mixer_decode

    case = mla_mixer_case([40, 70, 3, 9], 2, 16, 32, 16, 16, 16, torch.float32)
    padded = case.copy()
    padded.tables[2:], padded.lens[2:], padded.block_rows[2:] = 0, 1, 0
    out, expected = padded.copy().run(mla_mixer_decode), case.run(reference)
    torch.testing.assert_close(out[:2], expected[:2], rtol=1e-5, atol=1e-5)
    padded.lens[2:] = 0
    assert torch.isfinite(padded.run(mla_mixer_decode)).all()


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kernels, check_rows_that_share_the_sink)


def test_rotated_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_rotated_kernels, check_rotation_where_it_is_absorbed)


def testbest_splits() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_mixer.triton.mixer import best_splits

    assert [best_splits(B, 132) for B in (1, 2, 4, 8, 16, 32, 64, 128, 1000)] == [128, 64, 32, 16, 8, 4, 2, 1, 1]
    assert [best_splits(B, 132) for B in (24, 48, 70, 96, 140, 256)] == [5, 2, 3, 1, 4, 1]  # the quickest measured
    assert best_splits(1, 8) == 8


POINTERS = ("x", "norm_weight", "w_uk", "w_uv", "blocks", "q", "part", "out")
TYPES = {
    **{f"{name}_ptr": "*bf16" for name in POINTERS},
    "block_rows_ptr": "*i64",
    "positions_ptr": "*i64",
    "frequencies_ptr": "*fp32",
    "tables_ptr": "*i32",
    "lens_ptr": "*i32",
    "stats_ptr": "*fp32",
    "arrived_ptr": "*i32",
    "B": "i32",
    "splits": "i32",
    "x_stride": "i32",
    "table_stride": "i32",
    "w_stride_h": "i32",
    "eps": "fp32",
    "rope_scale": "fp32",
    "scale_log2": "fp32",
}
NONE = {  # of the arguments of the first kernel
    True: ("norm_weight_ptr", "blocks_ptr", "block_rows_ptr"),
    False: ("positions_ptr", "frequencies_ptr"),
}


def check_compiled(
    kernel: Any, constants: dict[str, Any], num_warps: int, types: dict[str, str] = TYPES, none: Sequence[str] = ()
) -> str:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names} | dict.fromkeys(none)
    types = {name: value for name, value in types.items() if name not in none}
    compiled = compile_sm90(kernel, types, constants, num_warps)
    assert compiled.spilled_bytes == 0, constants
    assert compiled.shared_bytes <= 227 * 1024, constants
    assert "griddepcontrol.wait" in compiled.ptx
    return compiled.ptx


@pytest.mark.parametrize(("H", "rotated"), [(32, False), (64, True), (8, True)])
@pytest.mark.parametrize("B", [1, 128])
def test_kernels_compile_for_hopper_without_spills(B: int, H: int, rotated: bool) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_mixer.triton import mixer as kernels

    shape = {"H": H, "K": 128, "R": 512, "P": 64, "V": 128, "BLOCK_SIZE": 64, "PDL": True}
    for launch in kernels.launches(B, H, 512, 128, 132, rotated):
        none = NONE[rotated] if launch.kernel is kernels._absorb else ()
        ptx = check_compiled(launch.kernel, {**shape, **launch.constants}, launch.num_warps, none=none)
        assert launch.kernel is not kernels._attend or "wgmma.mma_async" in ptx


@pytest.mark.parametrize("splits", [0, 2, 63])  # 0: the combination is a launch of its own
@pytest.mark.parametrize("block_h", [64, 32, 16])
def test_attention_in_gluon_compiles_for_hopper_without_spills(block_h: int, splits: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_mixer.triton import gluon, many_heads

    shared = {"q_shared_desc": descriptor(block_h, 64), "shared_desc": descriptor(1, 64, 64)}
    kernel, names, width = (
        (many_heads.attend, ("q_latent_desc", "latent_desc"), 512)
        if block_h == 64
        else (gluon.attend, ("q_half_desc", "half_desc"), 256)
    )
    latents = dict(zip(names, (descriptor(block_h, width), descriptor(1, 64, width)), strict=True))
    block_s, columns, block_v = gluon.tiles(128, splits or 128)
    whole = {"parts_desc": descriptor(columns, 1, 256), "w_uv_desc": descriptor(1, block_v, 256)}
    types = {**TYPES, **shared, **latents, **whole, "part_desc": descriptor(1, block_h, width)}
    constants = {"H": block_h, "V": 128, "BLOCK_SIZE": 64, "BLOCK_S": block_s, "PDL": True, "TOGETHER": splits > 0}
    ptx = check_compiled(kernel, constants, 8 if block_h == 64 else 4, types)
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx


@pytest.mark.parametrize(("H", "splits"), [(64, 64), (64, 1), (32, 128), (8, 5), (1, 2)])
def test_combine_in_gluon_compiles_for_hopper_without_spills(H: int, splits: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_mixer.triton import gluon

    block_s, columns, block_v = gluon.tiles(128, splits)
    constants = {"H": H, "V": 128, "BLOCK_S": block_s, "BLOCK_N": gluon.BLOCK_N, "PDL": True}
    types = {**TYPES, "w_uv_desc": descriptor(1, block_v, 256), "part_desc": descriptor(columns, 1, 256)}
    assert "wgmma.mma_async" in check_compiled(gluon.combine, constants, block_v // 16, types)


def test_what_changes_from_step_to_step_compiles_no_kernel_again() -> None:
    """A step with prompts has any number of decode rows, and block tables as wide as its longest sequence needs."""
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_mixer.triton import combining, gluon, many_heads, mixer

    changing = {"B", "splits", "table_stride"}
    for kernel in (gluon.attend, many_heads.attend, combining.combine, mixer._absorb, mixer._attend, mixer._combine):
        looked_at = {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize}
        assert not looked_at & changing, kernel


def test_heads_and_splits_of_a_program() -> None:
    """A context in splits for all multiprocessors; 64 heads read it together if there are sequences enough."""
    pytest.importorskip("triton")
    from thalweg.ops.attention.mla_mixer.triton.gluon import heads_and_splits

    few, many = (1, 2, 4, 8), (16, 32, 64, 128)  # the quickest measured
    assert [heads_and_splits(B, 64, 132) for B in few] == [(32, 64), (32, 32), (32, 16), (32, 8)]
    assert [heads_and_splits(B, 64, 132) for B in many] == [(64, 8), (64, 4), (64, 2), (64, 1)]
    assert [heads_and_splits(B, 32, 132) for B in (1, 8, 64, 128)] == [(32, 128), (32, 16), (32, 2), (32, 1)]
    assert [heads_and_splits(8, H, 132) for H in (1, 8, 40, 128)] == [(16, 16), (16, 16), (32, 8), (64, 8)]


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ({"H": 32, "K": 96, "R": 512, "P": 64, "V": 128, "S": 64}, "powers of two"),
        ({"H": 32, "K": 128, "R": 1024, "P": 64, "V": 128, "S": 64}, "R of at most 512"),
        ({"H": 32, "K": 128, "R": 512, "P": 256, "V": 128, "S": 64}, "P of at most 128"),
    ],
)
def test_other_shapes_go_to_the_reference_and_say_why(dims: dict[str, int], reason: str) -> None:
    resolver = Resolver()
    assert resolver.resolve(MLA_MIXER_DECODE, Where("cuda", "bfloat16"), MlaMixerDims(**dims)) is reference
    assert reason in dict(resolver.explain()[0].refused)["triton"]


def test_later_gpus_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the compiler gives tiles more shared memory than there is, and Hopper's products end the process."""
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_support, "_compute_capability_major", lambda: 10)
    dims = {"H": 32, "K": 128, "R": 512, "P": 64, "V": 128, "S": 64}
    resolver = Resolver()
    assert resolver.resolve(MLA_MIXER_DECODE, Where("cuda", "bfloat16"), MlaMixerDims(**dims)) is reference
    assert "(Hopper), not 10.x" in dict(resolver.explain()[0].refused)["triton"]
    monkeypatch.setattr(triton_support, "_compute_capability_major", lambda: 9)
    assert Resolver().resolve(MLA_MIXER_DECODE, Where("cuda", "bfloat16"), MlaMixerDims(**dims)) is not reference
