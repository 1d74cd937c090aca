"""Gated DeltaNet against its equations in float64: shared key heads, odd head dims, mixed lengths, sinks, extremes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.ops.gdn_case import SHAPES, DecodeCase, GdnShape, PrefillCase
from thalweg.ops.delta.conv1d.reference import conv1d_prefill
from thalweg.ops.delta.gdn.reference import gdn_mixer_decode, gdn_prefill
from thalweg.ops.norm.reference import gated_rms_norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_prefill_of_mixed_lengths(shape: GdnShape, fresh: bool) -> None:
    case = PrefillCase(shape, (0, 1, 15, 16, 17, 63, 64, 65, 0), fresh=fresh)
    case.check(case.run(gdn_prefill), 1e-5)


def test_prefill_in_bfloat16() -> None:
    case = PrefillCase(SHAPES[0], (130, 0, 7), torch.bfloat16)
    case.check(case.run(gdn_prefill), 5e-3)


def test_no_sequence_and_no_token() -> None:
    for lengths in ((), (0,), (0, 0)):
        case = PrefillCase(SHAPES[0], lengths)
        out = case.run(gdn_prefill)
        assert out.shape == (0, 6, 24)
        assert torch.equal(case.state.view(torch.int32), case.before.view(torch.int32))


@pytest.mark.parametrize("gate", [8.0, 30.0])
def test_prefill_of_extreme_decays(gate: float) -> None:
    case = PrefillCase(SHAPES[0], (70,), gate=gate)
    case.check(case.run(gdn_prefill), 1e-5)


def test_decays_that_forget_all() -> None:
    case = PrefillCase(SHAPES[0], (40,))
    case.A_log = torch.full_like(case.A_log, 6.0)
    case.check(case.run(gdn_prefill), 1e-5)


def test_a_poisoned_sequence_does_not_reach_its_neighbours() -> None:
    case = PrefillCase(SHAPES[0], (20, 20))
    case.inputs["v_THV"][:20] = torch.nan
    out = case.run(gdn_prefill)
    assert out[:20].isnan().any()
    assert out[20:].isfinite().all()
    assert case.state[case.slots[1]].isfinite().all()


def test_prefill_in_pieces_equals_whole() -> None:
    whole, pieces = PrefillCase(SHAPES[0], (77,)), PrefillCase(SHAPES[0], (77,))
    expected = whole.run(gdn_prefill)
    found, inputs = [], pieces.inputs
    for first, last in pairwise((0, 1, 16, 50, 77)):
        pieces.inputs = {name: x[first:last] for name, x in inputs.items()}
        pieces.offsets = [0, last - first]
        found.append(pieces.run(gdn_prefill))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces.state, whole.state, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_state_at_a_boundary_is_that_of_a_call_that_ends_there() -> None:
    whole, part = PrefillCase(SHAPES[0], (77,)), PrefillCase(SHAPES[0], (77,))
    arguments = dict(A_log_H=whole.A_log, dt_bias_H=whole.dt_bias, slots_B=whole.slots)
    other = 1 - int(whole.slots)
    gdn_prefill(
        *whole.inputs.values(), **arguments, state_NHVK=whole.state, offsets=[0, 77], boundaries=[(0, 64, other)]
    )
    first = (x[:64] for x in part.inputs.values())
    gdn_prefill(*first, **arguments, state_NHVK=part.state, offsets=[0, 64])
    assert torch.equal(whole.state[other], part.state[int(part.slots)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_follows_the_equations(shape: GdnShape, dtype: torch.dtype) -> None:
    # Of bf16, what a convolution rounds is forgiven as well.
    DecodeCase(shape, 3, dtype=dtype).check(gdn_mixer_decode, 1e-5 if dtype == torch.float32 else 2e-2)


def test_rows_that_share_the_sink_leave_others_alone() -> None:
    DecodeCase(SHAPES[0], 3).check(gdn_mixer_decode, 1e-5, padding=4)


def test_decode_of_no_rows() -> None:
    case = DecodeCase(SHAPES[0], 0, steps=1)
    assert case.run(gdn_mixer_decode).shape == (1, 0, 6 * 24)


def test_a_bfloat16_state_is_rounded_once_per_step() -> None:
    narrow = DecodeCase(SHAPES[0], 2, steps=1, state_dtype=torch.bfloat16)
    wide = DecodeCase(SHAPES[0], 2, steps=1)
    wide.state = narrow.state.float()
    assert torch.equal(narrow.run(gdn_mixer_decode), wide.run(gdn_mixer_decode))
    assert torch.equal(narrow.state, wide.state.bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_steps_equal_a_prefill(shape: GdnShape) -> None:
    """The fused step is convolution, rule and gated norm as a prompt has them."""
    T = 20
    steps, prompt = DecodeCase(shape, 1, steps=T), DecodeCase(shape, 1, steps=T)
    stepped = steps.run(gdn_mixer_decode)[:, 0]
    s, slots, offsets = shape, prompt.slots, [0, T]
    qkv, z, b, a = prompt.proj[:, 0].split([s.channels, s.H * s.V, s.H, s.H], dim=-1)
    qkv = conv1d_prefill(qkv, prompt.conv_state, slots, offsets, prompt.conv_weight)
    q, k, v = qkv.split([s.G * s.K, s.G * s.K, s.H * s.V], dim=-1)
    heads = (q.unflatten(-1, (s.G, s.K)), k.unflatten(-1, (s.G, s.K)), v.unflatten(-1, (s.H, s.V)))
    gated = dict(A_log_H=prompt.A_log, dt_bias_H=prompt.dt_bias)
    o = gdn_prefill(*heads, a, b, **gated, state_NHVK=prompt.state, slots_B=slots, offsets=offsets)
    o = gated_rms_norm(o, z.unflatten(-1, (s.H, s.V)), prompt.norm_weight, prompt.eps, silu=True)
    torch.testing.assert_close(stepped, o.flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps.state, prompt.state, rtol=1e-4, atol=1e-5)
    assert torch.equal(steps.conv_state, prompt.conv_state)
