"""The CPU's ops of prompts in C++ against float64, at every set of instructions that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cpp_case import LEVELS, instructions, needs_cpp, threads
from tests.ops.gdn_case import DecodeCase, GdnShape, distance
from tests.ops.mixer_prefill_case import MixerPrefillCase, mixer_boundaries
from thalweg.ops.delta import prefill_cpp

pytestmark = needs_cpp
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # one rounding to bfloat16 is 1.7e-3
MIXERS = {None: prefill_cpp.kda_mixer_prefill, 1: prefill_cpp.gdn_mixer_prefill, 2: prefill_cpp.gdn_mixer_prefill}


@pytest.fixture(params=LEVELS, ids=lambda level: level.name, autouse=True, scope="module")
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    with instructions(request.param):
        yield


@pytest.mark.parametrize("G", MIXERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "K", "options"),
    [
        ((0, 2, 81, 0), 64, {}),
        ((33, 1), 16, {"fresh": True}),
        ((65,), 48, {"gate": 30.0, "rate": 4.5}),  # log decays of -2700 for a token
        ((40,), 128, {"gate": -30.0}),
    ],
)
def test_delta_mixers(
    lengths: tuple[int, ...], K: int, options: dict[str, Any], dtype: torch.dtype, G: int | None
) -> None:
    case = MixerPrefillCase(lengths, 2, K, G=G, dtype=dtype, **options)
    case.check(case.run(MIXERS[G]), TOLERANCE[dtype])


@pytest.mark.parametrize("G", [None, 1])
def test_delta_mixers_over_states_in_bfloat16(G: int | None) -> None:
    case = MixerPrefillCase((70, 3), 2, 32, G=G, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    case.check(case.run(MIXERS[G]), 8e-3)


@pytest.mark.parametrize(("H", "G"), [(2, None), (4, 2)])
def test_delta_mixers_write_states_at_boundaries_and_go_on_to_the_bit(H: int, G: int | None) -> None:
    mixer_boundaries(MIXERS[G], "cpu", H, G)


@pytest.mark.parametrize("shape", [GdnShape(2, 6, 16, 32), GdnShape(1, 4, 64, 16, 1)])
def test_gdn_of_other_shapes(shape: GdnShape) -> None:
    case = DecodeCase(shape, B=1, steps=40)
    slot = int(case.slots[0])
    o, window, S = case.truth(case.proj[:, 0], case.conv_state[slot].clone(), case.state[slot].clone())
    out = prefill_cpp.gdn_mixer_prefill(
        case.proj[:, 0],
        conv_weight_CW=case.conv_weight,
        conv_state_NWC=case.conv_state,
        A_log_H=case.A_log,
        dt_bias_H=case.dt_bias,
        norm_weight_V=case.norm_weight,
        eps=case.eps,
        state_NHVK=case.state,
        slots_B=case.slots,
        offsets=[0, 40],
    )
    assert distance(out, o) < 2e-6
    assert distance(case.state[slot], S) < 2e-6
    assert torch.equal(case.conv_state[slot].double(), window)


def results(dtype: torch.dtype) -> list[Tensor]:
    cases = [(MixerPrefillCase((70, 40), 4, 32, G=G, dtype=dtype), MIXERS[G]) for G in (None, 2)]
    return [x for case, op in cases for x in (case.run(op), case.state[case.slots])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    with threads(1):
        alone = results(dtype)
    for count in (2, 5):
        with threads(count):
            for got, expected in zip(results(dtype), alone, strict=True):
                assert torch.equal(got, expected)
