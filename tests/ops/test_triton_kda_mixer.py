"""The decode mixer of a KDA layer: reference, kernel under the interpreter, and kernel compiled for Hopper."""

from __future__ import annotations

import pytest
import torch

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from tests.ops.kda_mixer_case import check_kda_mixer, kda_mixer_case
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KdaMixerDims
from thalweg.ops.delta.kda_mixer.reference import kda_mixer_decode as reference
from thalweg.ops.registry import Resolver, Where


@pytest.mark.parametrize("gate", [1.0, 30.0])
def test_reference(gate: float) -> None:
    check_kda_mixer(reference, kda_mixer_case(3, 2, 16, 8, torch.float32, gate=gate), 1e-5, 1e-5)


def test_reference_in_bf16() -> None:
    check_kda_mixer(reference, kda_mixer_case(3, 2, 32, 16, torch.bfloat16), 0.02, 0.02)


def check_kernel() -> None:
    from thalweg.ops.delta.kda_mixer.triton import kda_mixer_decode

    for B, H, K, R, gate in ((3, 3, 16, 32, 1.0), (1, 2, 64, 16, 30.0), (13, 1, 16, 16, 1.0)):
        check_kda_mixer(kda_mixer_decode, kda_mixer_case(B, H, K, R, torch.float32, gate=gate), 1e-5, 1e-5)
    assert kda_mixer_case(0, 2, 16, 16, torch.float32).run(kda_mixer_decode).shape == (0, 32)


def check_zero_keys_and_rows_that_share_the_sink() -> None:
    from thalweg.ops.delta.kda_mixer.triton import kda_mixer_decode

    case = kda_mixer_case(4, 2, 16, 16, torch.float32)
    case.proj[0] = 0
    case.conv_state[case.slots[0]] = 0
    check_kda_mixer(kda_mixer_decode, case, 1e-5, 1e-5)
    padded = case.copy()
    padded.slots[2:] = 0
    out, expected = padded.run(kda_mixer_decode), case.run(reference)
    torch.testing.assert_close(out[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(out).all()


def test_kernel_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kernel, check_zero_keys_and_rows_that_share_the_sink)


TYPES = {
    "proj_ptr": "*bf16",
    "conv_weight_ptr": "*bf16",
    "conv_state_ptr": "*bf16",
    "w_up_ptr": "*bf16",
    "A_log_ptr": "*fp32",
    "dt_bias_ptr": "*fp32",
    "norm_weight_ptr": "*bf16",
    "state_ptr": "*fp32",
    "slots_ptr": "*i64",
    "out_ptr": "*bf16",
    "B": "i32",
    "rows": "i32",
    "proj_stride": "i32",
    "eps": "fp32",
}


@pytest.mark.parametrize("chunk", [32, 64])
def test_kernel_compiles_for_hopper_without_spills(chunk: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.kda_mixer.triton import _kda_mixer

    constants = {"H": 32, "K": 128, "R": 128, "CHUNK": chunk, "PDL": True}
    compiled = compile_sm90(_kda_mixer, TYPES, constants, 8)
    assert compiled.spilled_bytes <= 16
    assert "griddepcontrol.wait" in compiled.ptx


def test_programs_go_round_the_multiprocessors_once() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.kda_mixer.triton import rows_per_program

    assert [rows_per_program(B, 32, 132) for B in (1, 4, 8, 16, 24, 64, 128)] == [1, 1, 2, 4, 6, 16, 16]


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ({"H": 32, "K": 96, "V": 96, "R": 128, "W": 3}, "powers of two"),
        ({"H": 32, "K": 256, "V": 256, "R": 256, "W": 3}, "from 16 to 128"),
        ({"H": 32, "K": 128, "V": 64, "R": 128, "W": 3}, "K = V"),
        ({"H": 32, "K": 128, "V": 128, "R": 128, "W": 2}, "W = 3 inputs, not 2"),
    ],
)
def test_other_shapes_go_to_the_reference_and_say_why(dims: dict[str, int], reason: str) -> None:
    resolver = Resolver()
    assert resolver.resolve(KDA_MIXER_DECODE, Where("cuda", "bfloat16"), KdaMixerDims(**dims)) is reference
    assert reason in dict(resolver.explain()[0].refused)["triton"]
