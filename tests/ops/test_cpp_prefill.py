"""The CPU's ops of prompts in C++ against float64, at every set of instructions that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cpp_case import LEVELS, instructions, needs_cpp, threads
from tests.ops.gdn_case import DecodeCase, GdnShape, distance
from tests.ops.gqa_case import SHAPES, GqaCase, GqaShape, assert_near
from tests.ops.mixer_prefill_case import MixerPrefillCase, mixer_boundaries
from tests.ops.prefill_case import mla_case, ratio
from thalweg.ops.attention.gqa import cpp as gqa
from thalweg.ops.attention.mla import cpp as mla
from thalweg.ops.attention.mla import reference as mla_reference
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("cached", "new", "sizes"),
    [
        ([0], [1], {}),
        ([0, 5, 0, 60], [70, 0, 3, 50], {"H": 3}),
        ([30, 0], [3, 20], {"K": 24, "P": 8, "V": 20, "R": 41, "block_size": 5}),
        ([800], [130], {"H": 3}),  # keys and values of more tokens than are there at a time
    ],
)
def test_latent_attention(cached: list[int], new: list[int], sizes: dict[str, int], dtype: torch.dtype) -> None:
    case = mla_case(cached, new, dtype, **sizes)
    q = case.pop("q_THX")
    truth = mla_reference.mla_prefill(q.double().float(), **{**case, "up_HXR": case["up_HXR"].float()})
    for queries in (q, q.transpose(0, 1).contiguous().transpose(0, 1)):
        out = mla.mla_prefill(queries, **case)
        assert out.dtype == dtype
        assert ratio(out, truth) < (3e-3 if dtype == torch.bfloat16 else 2e-6)


def test_latent_attention_of_scores_far_apart() -> None:
    case = mla_case([0], [200], torch.float32)
    blocks = case["blocks_MSC"]
    blocks *= torch.linspace(1, 60, blocks.numel()).view_as(blocks)
    q = case.pop("q_THX") * 3
    assert ratio(mla.mla_prefill(q, **case), mla_reference.mla_prefill(q, **case)) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention_in_chunks_and_alone_has_the_same_bits(dtype: torch.dtype) -> None:
    case = mla_case([10, 700], [150, 100], dtype)
    q, tables = case.pop("q_THX"), case.pop("block_tables_BN")
    whole = mla.mla_prefill(q, **case, block_tables_BN=tables)
    for b, cached, first, last in ((0, 10, 0, 90), (0, 100, 90, 150), (1, 700, 150, 250), (1, 749, 199, 200)):
        where = {"block_tables_BN": tables[b : b + 1], "context_lens": [cached], "offsets": [0, last - first]}
        assert torch.equal(mla.mla_prefill(q[first:last], **{**case, **where}), whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, GqaShape(16, 2, 256, 64, 16)])
def test_gated_attention(shape: GqaShape, dtype: torch.dtype) -> None:
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    case = GqaCase(shape, [0, 5, 0, 33], [1, 20, 0, 50], dtype, scale=1.2, first_position=1000)
    q = case.check_prepare(gqa.gqa_prepare, tolerance)
    assert_near(case.prefill(gqa.gqa_prefill, q), case.truth()[1], tolerance)


@pytest.mark.parametrize("spread", [0.0, 12.0])
def test_gated_attention_of_scores_far_apart(spread: float) -> None:
    case = GqaCase(SHAPES[3], [0, 800], [30, 20], spread=spread)
    q = case.prepare(gqa.gqa_prepare)
    assert_near(case.prefill(gqa.gqa_prefill, q), case.truth()[1], 2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_attention_in_chunks_has_the_same_bits(dtype: torch.dtype) -> None:
    case = GqaCase(SHAPES[0], [0], [150], dtype)
    q = case.prepare(gqa.gqa_prepare)
    whole = case.prefill(gqa.gqa_prefill, q)
    for first, last in ((0, 50), (50, 149), (149, 150)):
        rows = slice(first, last)
        part = gqa.gqa_prefill(q[rows], case.proj[rows], **case.blocks, starts=[first], offsets=[0, last - first])
        assert torch.equal(part, whole[rows])


def results(dtype: torch.dtype) -> list[Tensor]:
    cases = [(MixerPrefillCase((70, 40), 4, 32, G=G, dtype=dtype), MIXERS[G]) for G in (None, 2)]
    gated = GqaCase(SHAPES[3], [60, 7], [130, 40], dtype)
    q = gated.prepare(gqa.gqa_prepare)
    attention = [mla.mla_prefill(**mla_case([100, 7], [130, 40], dtype, H=6)), q, gated.prefill(gqa.gqa_prefill, q)]
    return [x for case, op in cases for x in (case.run(op), case.state[case.slots])] + attention


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    with threads(1):
        alone = results(dtype)
    for count in (2, 5):
        with threads(count):
            for got, expected in zip(results(dtype), alone, strict=True):
                assert torch.equal(got, expected)
