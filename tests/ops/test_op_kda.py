"""Kimi Delta Attention against a naive float64 recurrence, with the cases that break kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prefill_case import kda_boundaries
from thalweg.ops.delta.kda import reference
from thalweg.ops.delta.kda.reference import chunk_kda, kda_decode, kda_gate, kda_prefill, recurrent_kda

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1000)
H, K, V = 2, 32, 24
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_HVK: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, [T, H, ...] inputs, in float64: the equations of the op's contract, read aloud."""
    q, k, v, g, beta, S = (x.double() for x in (q, k, v, g, beta, state_HVK))
    out = torch.empty_like(v)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            qt = q[t, h] / torch.sqrt((q[t, h] ** 2).sum() + 1e-6) * q.shape[-1] ** -0.5
            kt = k[t, h] / torch.sqrt((k[t, h] ** 2).sum() + 1e-6)
            decayed = S[h] * torch.exp(g[t, h])[None, :]
            new = decayed + beta[t, h] * torch.outer(v[t, h] - decayed @ kt, kt)
            S = torch.cat((S[:h], new[None], S[h + 1 :]))
            out[t, h] = new @ qt
    return out, S


def ratio(out: Tensor, ref: Tensor) -> float:
    assert torch.isfinite(out).all()
    return float((out.double() - ref).norm() / ref.norm().clamp_min(1e-30))


def make_inputs(T: int, dtype: torch.dtype = torch.float32, gate: float | None = None, seed: int = 0) -> list[Tensor]:
    """q, k, v, g, beta of T tokens; `gate` replaces the gate input by +-gate with random signs."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    f = randn(T, H, K) if gate is None else gate * randn(T, H, K).sign()
    g = kda_gate(f, randn(H), randn(H, K))
    return [
        *(x.to(dtype) for x in (randn(T, H, K), randn(T, H, K), randn(T, H, V))),
        g,
        randn(T, H).sigmoid(),
    ]


def heads_first(inputs: list[Tensor]) -> list[Tensor]:
    return [x[None].transpose(1, 2) for x in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_prefill_of_mixed_lengths_in_one_call(dtype: torch.dtype, with_state: bool) -> None:
    lengths = (0, *LENGTHS, 0, 17)
    offsets = [0]
    for n in lengths:
        offsets.append(offsets[-1] + n)
    inputs = make_inputs(offsets[-1], dtype)
    slots = torch.randperm(2 * len(lengths), generator=torch.Generator().manual_seed(1))[: len(lengths)]
    state = torch.full((2 * len(lengths), H, V, K), torch.nan)
    state[slots] = torch.randn(len(lengths), H, V, K) if with_state else 0.0
    before = state.clone()
    out = kda_prefill(*inputs, state_NHVK=state, slots_B=slots, offsets=offsets)
    assert out.dtype == dtype
    for b, n in enumerate(lengths):
        span = slice(offsets[b], offsets[b + 1])
        slot = int(slots[b])
        if n == 0:
            assert torch.equal(state[slot], before[slot])
            continue
        ref_out, ref_state = naive(*(x[span] for x in inputs), before[slot])
        assert ratio(out[span], ref_out) < TOLERANCE[dtype], n
        assert ratio(state[slot], ref_state) < TOLERANCE[dtype], n
    untouched = [i for i in range(len(state)) if i not in slots.tolist()]
    assert torch.equal(state[untouched].view(torch.int32), before[untouched].view(torch.int32))


@pytest.mark.parametrize("gate", [-30.0, -8.0, 8.0, 30.0, None])
@pytest.mark.parametrize("form", [recurrent_kda, chunk_kda], ids=["recurrent", "chunk"])
def test_extreme_gates(form, gate: float | None) -> None:
    """The same strong gate everywhere; None mixes +30 and -30, where forgotten and kept channels meet."""
    T = 65
    inputs = make_inputs(T, gate=30.0)
    if gate is not None:
        inputs[3] = kda_gate(torch.full((T, H, K), gate), torch.ones(H), torch.zeros(H, K))
    state = torch.randn(H, V, K, generator=torch.Generator().manual_seed(2))
    out, final = form(*heads_first(inputs), state[None].transpose(-1, -2))
    ref_out, ref_state = naive(*inputs, state)
    assert ratio(out[0].transpose(0, 1), ref_out) < 1e-5
    assert ratio(final[0].transpose(-1, -2), ref_state) < 1e-5


def test_strong_decay_then_weak_keeps_precision() -> None:
    """After decays of -2000 in a chunk, differences of cumulative sums would lose what comes next."""
    inputs = make_inputs(32)
    inputs[3] = torch.full((32, H, K), -1e-3)
    inputs[3][:4] = -2000.0
    out, final = chunk_kda(*heads_first(inputs))
    ref_out, ref_state = naive(*inputs, torch.zeros(H, V, K))
    assert ratio(out[0].transpose(0, 1), ref_out) < 1e-6
    assert ratio(final[0].transpose(-1, -2), ref_state) < 1e-6


def test_epsilon_is_inside_the_root() -> None:
    """Queries and keys so small that 1e-6 is most of their squared norm."""
    inputs = make_inputs(20)
    inputs[0], inputs[1] = inputs[0] * 1e-4, inputs[1] * 1e-4
    ref_out, ref_state = naive(*inputs, torch.zeros(H, V, K))
    for form in (recurrent_kda, chunk_kda):
        out, final = form(*heads_first(inputs))
        assert ratio(out[0].transpose(0, 1), ref_out) < 1e-5
        assert ratio(final[0].transpose(-1, -2), ref_state) < 1e-5


def test_zero_keys_only_decay_the_state() -> None:
    q, k, v, g, beta = make_inputs(20)
    state = torch.randn(1, H, V, K)
    expected = (state[0].double() * g.double().sum(0).exp()[:, None, :]).float()
    kda_prefill(q, torch.zeros_like(k), v, g, beta, state_NHVK=state, slots_B=torch.tensor([0]), offsets=[0, 20])
    torch.testing.assert_close(state[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_follows_the_recurrence(dtype: torch.dtype) -> None:
    B, steps = 3, 20
    state = torch.randn(8, H, V, K, generator=torch.Generator().manual_seed(3))
    before = state.clone()
    slots = torch.tensor([5, 0, 3])
    inputs = make_inputs(B * steps, dtype)
    per_sequence = [x.unflatten(0, (B, steps)) for x in inputs]
    outs = [kda_decode(*(x[:, t] for x in per_sequence), state, slots) for t in range(steps)]
    out = torch.stack(outs, dim=1)
    assert out.dtype == dtype
    for b in range(B):
        ref_out, ref_state = naive(*(x[b] for x in per_sequence), before[slots[b]])
        assert ratio(out[b], ref_out) < TOLERANCE[dtype]
        assert ratio(state[slots[b]], ref_state) < TOLERANCE[dtype]
    others = [1, 2, 4, 6, 7]
    assert torch.equal(state[others], before[others])


def test_bf16_state_storage_is_rounded_once_per_call() -> None:
    inputs = make_inputs(40)
    narrow = torch.randn(2, H, V, K, generator=torch.Generator().manual_seed(4)).bfloat16()
    wide, slots = narrow.float(), torch.tensor([1])
    calls = (
        lambda state: kda_prefill(*inputs, state_NHVK=state, slots_B=slots, offsets=[0, 40]),
        lambda state: kda_decode(*(x[:1] for x in inputs), state, slots),
    )
    for call in calls:
        assert torch.equal(call(narrow), call(wide))
        assert torch.equal(narrow, wide.bfloat16())
        wide = narrow.float()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 80),
    cut=st.floats(0, 1),
    chunk=st.sampled_from([1, 3, 8, 16, 32]),
    seed=st.integers(0, 99),
)
def test_any_split_and_chunk_size_agree_with_the_recurrence(T: int, cut: float, chunk: int, seed: int) -> None:
    inputs = heads_first(make_inputs(T, seed=seed))
    start = torch.randn(1, H, K, V, generator=torch.Generator().manual_seed(seed))
    ref_out, ref_state = recurrent_kda(*(x.double() for x in inputs), start.double())
    t = round(cut * T)
    first, middle = chunk_kda(*(x[:, :, :t] for x in inputs), start, chunk_size=chunk)
    second, final = chunk_kda(*(x[:, :, t:] for x in inputs), middle, chunk_size=chunk)
    assert ratio(torch.cat((first, second), dim=2), ref_out) < 1e-5
    assert ratio(final, ref_state) < 1e-5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_batched_prefill_equals_each_alone(lengths: list[int], seed: int) -> None:
    offsets = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    inputs = make_inputs(offsets[-1], seed=seed)
    state = torch.randn(len(lengths), H, V, K, generator=torch.Generator().manual_seed(seed))
    alone = state.clone()
    out = kda_prefill(*inputs, state_NHVK=state, slots_B=torch.arange(len(lengths)), offsets=offsets)
    for b, n in enumerate(lengths):
        span = slice(offsets[b], offsets[b + 1])
        single = kda_prefill(*(x[span] for x in inputs), state_NHVK=alone, slots_B=torch.tensor([b]), offsets=[0, n])
        torch.testing.assert_close(out[span], single, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_states_at_boundaries_are_those_of_calls_that_end_there(dtype: torch.dtype) -> None:
    kda_boundaries(kda_prefill, "cpu", dtype)


def test_prefill_then_decode_equals_prefill() -> None:
    inputs = make_inputs(40)
    whole, split = torch.zeros(1, H, V, K), torch.zeros(1, H, V, K)
    slot = torch.tensor([0])
    out = kda_prefill(*inputs, state_NHVK=whole, slots_B=slot, offsets=[0, 40])
    pieces = [kda_prefill(*(x[:33] for x in inputs), state_NHVK=split, slots_B=slot, offsets=[0, 33])]
    pieces += [kda_decode(*(x[t : t + 1] for x in inputs), split, slot) for t in range(33, 40)]
    torch.testing.assert_close(torch.cat(pieces), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


def test_a_poisoned_sequence_does_not_reach_its_neighbours() -> None:
    inputs = make_inputs(40)
    inputs[2][:20] = torch.nan
    state = torch.zeros(2, H, V, K)
    out = kda_prefill(*inputs, state_NHVK=state, slots_B=torch.tensor([0, 1]), offsets=[0, 20, 40])
    assert torch.isnan(out[:20]).any()
    assert torch.isfinite(out[20:]).all()
    assert torch.isfinite(state[1]).all()


def test_gradients_of_the_chunked_form() -> None:
    inputs = [x.double().requires_grad_() for x in heads_first(make_inputs(21))]
    start = torch.randn(1, H, K, V, dtype=torch.float64, requires_grad=True)
    leaves = [*inputs, start]
    weight_o, weight_s = torch.randn(1, H, 21, V).double(), torch.randn(1, H, K, V).double()
    grads = []
    for form in (recurrent_kda, chunk_kda):
        out, final = form(*inputs, start)
        grads.append(torch.autograd.grad((out * weight_o).sum() + (final * weight_s).sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradients_stay_finite_with_gates_that_forget_everything() -> None:
    inputs = [x.requires_grad_() for x in heads_first(make_inputs(33, gate=30.0))]
    out, final = chunk_kda(*inputs)
    for grad in torch.autograd.grad(out.square().sum() + final.square().sum(), inputs):
        assert torch.isfinite(grad).all()


def test_gate_is_minus_exp_a_softplus_in_fp32() -> None:
    f = torch.tensor([-40.0, -8.0, 0.0, 8.0, 40.0]).bfloat16().view(1, 1, 5)
    A_log, dt_bias = torch.tensor([0.7]), torch.tensor([[0.1, -0.2, 0.3, 0.0, 0.0]])
    g = kda_gate(f, A_log, dt_bias)
    x = f.double() + dt_bias.double()
    expected = -A_log.double().exp() * torch.log1p(x.exp())
    assert g.dtype == torch.float32
    assert (g <= 0).all()
    torch.testing.assert_close(g.double(), expected, rtol=2e-6, atol=1e-18)


def test_inputs_are_left_alone() -> None:
    inputs = make_inputs(18)
    copies = [x.clone() for x in inputs]
    state = torch.zeros(1, H, V, K)
    kda_prefill(*inputs, state_NHVK=state, slots_B=torch.tensor([0]), offsets=[0, 18])
    kda_decode(*(x[:1] for x in inputs), state, torch.tensor([0]))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_groups_do_not_pad_across_chunk_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long and many short sequences: the work is their sum, not the longest times their number."""
    tokens = []

    def spy(q: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        tokens.append(q.shape[0] * q.shape[2])
        return chunk_kda(q, *args)

    monkeypatch.setattr(reference, "chunk_kda", spy)
    lengths = [300] + [5] * 20
    offsets = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    kda_prefill(*make_inputs(400), state_NHVK=torch.zeros(21, H, V, K), slots_B=torch.arange(21), offsets=offsets)
    assert sum(tokens) == 400
