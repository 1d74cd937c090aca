"""Causal depthwise convolution with its rolling state, against a per-element float64 sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prefill_case import conv_boundaries
from thalweg.ops.delta.conv1d.reference import conv1d_decode, conv1d_prefill

C, TAPS = 6, 4
W = TAPS - 1


def naive(x_TC: Tensor, state_WC: Tensor, weight_CW: Tensor) -> tuple[Tensor, Tensor]:
    """Output in float64 and the raw inputs that the next token still sees."""
    history = torch.cat((state_WC.double(), x_TC.double()))
    out = torch.zeros(len(x_TC), history.shape[1], dtype=torch.float64)
    taps = weight_CW.shape[1]
    for t in range(len(x_TC)):
        for age in range(taps):
            out[t] += history[t + taps - 1 - age] * weight_CW[:, taps - 1 - age].double()
    return out / (1 + (-out).exp()), history[len(history) - (taps - 1) :]


def inputs(T: int, N: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(T, C, generator=rng),
        torch.randn(N, W, C, generator=rng),
        torch.randn(C, TAPS, generator=rng),
    )


def test_a_single_sequence_is_torch_conv1d() -> None:
    x, _, weight = inputs(20)
    state = torch.zeros(1, W, C)
    out = conv1d_prefill(x, state, torch.tensor([0]), [0, 20], weight)
    expected = F.silu(F.conv1d(F.pad(x.t()[None], (W, 0)), weight[:, None], groups=C))[0].t()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(state[0], x[-W:])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_prefill_of_any_lengths(lengths: list[int], seed: int) -> None:
    offsets = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    x, state, weight = inputs(offsets[-1], seed=seed)
    slots = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[: len(lengths)]
    idle = [i for i in range(6) if i not in slots.tolist()]
    state[idle] = torch.nan
    before = state.clone()
    out = conv1d_prefill(x, state, slots, offsets, weight)
    for b, slot in enumerate(slots.tolist()):
        span = slice(offsets[b], offsets[b + 1])
        expected, history = naive(x[span], before[slot], weight)
        torch.testing.assert_close(out[span].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(state[slot].double(), history)
    assert torch.equal(state[idle].view(torch.int32), before[idle].view(torch.int32))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(T=st.integers(1, 12), cut=st.integers(0, 12), seed=st.integers(0, 99))
def test_whole_pieces_and_decode_agree_bitwise_on_state(T: int, cut: int, seed: int) -> None:
    x, state, weight = inputs(T, seed=seed)
    cut, slot = min(cut, T), torch.tensor([2])
    pieces, steps = state.clone(), state.clone()
    whole = conv1d_prefill(x, state, slot, [0, T], weight)
    split = [conv1d_prefill(part, pieces, slot, [0, len(part)], weight) for part in (x[:cut], x[cut:])]
    single = [conv1d_decode(x[t : t + 1], steps, slot, weight) for t in range(T)]
    torch.testing.assert_close(torch.cat(split), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(single), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(pieces, state)
    assert torch.equal(steps, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [2, 4, 9])
def test_states_at_boundaries_are_those_of_calls_that_end_there(dtype: torch.dtype, taps: int) -> None:
    conv_boundaries(conv1d_prefill, "cpu", dtype, W=taps - 1)


def test_decode_of_a_batch_leaves_other_slots_alone() -> None:
    x, state, weight = inputs(2)
    state[[0, 2, 5]] = torch.nan
    before = state.clone()
    out = conv1d_decode(x, state, torch.tensor([4, 1]), weight)
    for b, slot in enumerate((4, 1)):
        expected, history = naive(x[b : b + 1], before[slot], weight)
        torch.testing.assert_close(out[b].double(), expected[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(state[slot].double(), history)
    idle = [0, 2, 3, 5]
    assert torch.equal(state[idle].view(torch.int32), before[idle].view(torch.int32))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_sums_in_fp32(state_dtype: torch.dtype) -> None:
    x, state, weight = inputs(9)
    x, weight, state = x.bfloat16(), weight.bfloat16(), state.bfloat16().to(state_dtype)
    expected, history = naive(x, state[1], weight)
    single = state.clone()
    out = conv1d_prefill(x, state, torch.tensor([1]), [0, 9], weight)
    assert out.dtype == torch.bfloat16
    assert state.dtype == state_dtype
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    assert torch.equal(state[1].double(), history)
    first = conv1d_decode(x[:1], single, torch.tensor([1]), weight)
    torch.testing.assert_close(first.double(), expected[:1], rtol=2**-8, atol=1e-6)


def test_a_kernel_of_one_tap_has_no_state() -> None:
    x, state = torch.randn(5, C), torch.empty(2, 0, C)
    weight = torch.randn(C, 1)
    expected = F.silu(x * weight[:, 0])
    torch.testing.assert_close(conv1d_prefill(x, state, torch.tensor([0]), [0, 5], weight), expected)
    torch.testing.assert_close(conv1d_decode(x[:1], state, torch.tensor([0]), weight), expected[:1])
