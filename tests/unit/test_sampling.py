"""The sampler: every option against its definition, and independence from neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.core import Admission, SamplingParams, pack_ids
from thalweg.errors import InvalidRequest
from thalweg.ops.sample.reference import sample, splitmix64
from thalweg.sampling.adjust import LogitAdjuster
from thalweg.sampling.choose import draw, sample_filtered, uniform
from thalweg.sampling.logprobs import ROWS, token_logprobs
from thalweg.sampling.sampler import Sampler
from thalweg.sampling.table import SamplingTable

V = 50
CPU = torch.device("cpu")


def sampler(*requests: tuple[SamplingParams, list[int], int], slots: int = 8) -> Sampler:
    """A sampler with requests (params, token ids, prompt length) admitted to slots 1, 2, ..."""
    s = Sampler(SamplingTable(slots, V, device=CPU, eos_token_ids=frozenset({1})), sample)
    for slot, (params, ids, num_prompt) in enumerate(requests, start=1):
        admit(s, slot, params, ids, num_prompt)
    return s


def admit(s: Sampler, slot: int, params: SamplingParams, ids: list[int], num_prompt: int = 1) -> None:
    a = Admission(slot, f"r{slot}", pack_ids(ids), num_prompt, params, params.seed or 0, False)
    s.table.write(torch.tensor([slot]), *map(torch.from_numpy, s.table.admit([a])))


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * 2


def choose(params: SamplingParams, logits: torch.Tensor, position: int = 5, ids: list[int] | None = None) -> int:
    ids = [3, 4] if ids is None else ids
    out, _, errors = sampler((params, ids, 2))(logits[None].clone(), [1], [position])
    assert not errors
    return int(out[0])


def test_splitmix64_gives_the_published_sequence() -> None:
    # The first outputs of the generator seeded with 1234567 (state advances by the golden gamma).
    gamma, state, got = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        signed = state - 2**64 if state >= 2**63 else state
        got.append(int(splitmix64(torch.tensor(signed))) % 2**64)
        state = (state + gamma) % 2**64
    assert got == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_uniform_and_reproducible() -> None:
    seeds, positions = torch.arange(200).repeat_interleave(50), torch.arange(50).repeat(200)
    u = uniform(seeds, positions)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(u.var()) - 1 / 12) < 0.005
    assert torch.equal(u, uniform(seeds, positions))


def test_greedy_takes_the_largest() -> None:
    logits = rows(1)[0]
    assert choose(SamplingParams(temperature=0), logits) == int(logits.argmax())


def test_tiny_temperature_is_greedy_and_finite() -> None:
    logits = rows(1)[0] * 1e4
    for extra in ({}, {"top_p": 0.9}):
        assert choose(SamplingParams(temperature=1e-30, seed=1, **extra), logits) == int(logits.argmax())


@pytest.mark.parametrize("filtered", [False, True])
def test_draws_follow_the_distribution(filtered: bool) -> None:
    n = 20_000
    logits = rows(1, seed=2).expand(n, V)
    u = uniform(torch.zeros(n, dtype=torch.int64), torch.arange(n))
    t = torch.full((n,), 0.7)
    if filtered:
        ids = sample_filtered(logits, t, torch.zeros(n, dtype=torch.int64), torch.ones(n), torch.zeros(n), u)
    else:
        ids = sample(logits, t, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    expected = torch.softmax(logits[0] / 0.7, -1)
    observed = torch.bincount(ids, minlength=V) / n
    assert (observed - expected).abs().max() < 0.015


def test_draw_never_takes_an_impossible_token() -> None:
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for u in (0.0, 0.2999, 0.3001, 1 - 2**-24):
        assert int(draw(probs, torch.tensor([u]))) in (1, 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, V),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.1, 5),
)
def test_filters_keep_what_they_say(seed: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    logits = rows(1, seed)[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    chosen = choose(params, logits)
    probs = torch.softmax(logits.double() / temperature, -1)
    order = probs.argsort(descending=True, stable=True).tolist()
    kept = order[:top_k]
    total, running, allowed = sum(float(probs[i]) for i in kept), 0.0, []
    for i in kept:
        if allowed and running / total >= top_p + 1e-5:
            break
        if not allowed or probs[i] >= (min_p - 1e-5) * probs[order[0]]:
            allowed.append(i)
        running += float(probs[i])
    assert chosen in allowed


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(seed=7),
        SamplingParams(seed=7, top_p=0.8),
        SamplingParams(seed=7, top_k=5, presence_penalty=1.5),
        SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2),
    ]
    logits = rows(len(kinds), seed=5)
    together, _, _ = sampler(*((p, [3, 4, 9], 2) for p in kinds))(logits.clone(), [1, 2, 3, 4, 5], [3] * 5)
    for i, p in enumerate(kinds):
        alone, _, _ = sampler((p, [3, 4, 9], 2))(logits[i : i + 1].clone(), [1], [3])
        assert int(alone[0]) == int(together[i])


def test_same_seed_same_draw_and_positions_differ() -> None:
    logits = torch.zeros(V)
    params = SamplingParams(seed=11)
    draws = [choose(params, logits, position=p) for p in range(30)]
    assert draws == [choose(params, logits, position=p) for p in range(30)]
    assert len(set(draws)) > 10


def test_logit_bias_and_penalties() -> None:
    logits = torch.zeros(V)
    assert choose(SamplingParams(temperature=0, logit_bias={17: 5.0}), logits) == 17
    logits[9], logits[8] = 2.0, 1.5
    assert choose(SamplingParams(temperature=0), logits, ids=[3, 4, 9]) == 9
    assert choose(SamplingParams(temperature=0, presence_penalty=0.6), logits, ids=[3, 4, 9]) == 8
    # 9 in the prompt only: presence and frequency look at the output, repetition at both.
    assert choose(SamplingParams(temperature=0, presence_penalty=2), logits, ids=[3, 9]) == 9
    assert choose(SamplingParams(temperature=0, repetition_penalty=2), logits, ids=[3, 9]) == 8
    assert choose(SamplingParams(temperature=0, frequency_penalty=0.3), logits, ids=[3, 4, 9]) == 9
    assert choose(SamplingParams(temperature=0, frequency_penalty=0.3), logits, ids=[3, 4, 9, 9]) == 8


def test_penalties_follow_the_tokens_chosen() -> None:
    s = sampler((SamplingParams(temperature=0, presence_penalty=2), [3], 1))
    logits = torch.zeros(1, V)
    logits[0, 9], logits[0, 8] = 1.5, 1.0
    first, _, _ = s(logits.clone(), [1], [1])
    second, _, _ = s(logits.clone(), [1], [2])
    assert (int(first[0]), int(second[0])) == (9, 8)


def test_min_tokens_holds_back_every_end() -> None:
    logits = torch.zeros(V)
    logits[1], logits[6], logits[2] = 5.0, 4.0, 3.0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(6,))
    assert choose(params, logits, ids=[3, 4]) == 2
    assert choose(params, logits, ids=[3, 4, 7, 7]) == 1


def test_logprobs_come_from_the_raw_logits() -> None:
    logits = rows(1)[0]
    s = sampler((SamplingParams(temperature=0, logprobs=3, logit_bias={7: 100.0}), [3, 4], 2))
    ids, logprobs, _ = s(logits[None].clone(), [1], [2])
    expected = torch.log_softmax(logits.double(), -1)
    entry = logprobs[1]
    assert entry.token_id == 7 == int(ids[0])
    assert math.isclose(entry.logprob, float(expected[7]), abs_tol=1e-5)
    assert entry.rank == int((expected > expected[7]).sum()) + 1
    assert entry.top_ids == expected.topk(3).indices.tolist()


def test_logprobs_of_zero_top_tokens() -> None:
    (entry,) = token_logprobs(rows(1), torch.tensor([4]), 0)
    assert entry.top_ids == []


def test_logprobs_of_many_rows_are_those_of_each() -> None:
    logits, ids = rows(ROWS + 3), torch.arange(ROWS + 3) % V
    entries = token_logprobs(logits, ids, 2)
    assert [e.token_id for e in entries] == ids.tolist()
    for r in (0, ROWS - 1, ROWS, ROWS + 2):
        assert entries[r] == token_logprobs(logits[r : r + 1], ids[r : r + 1], 2)[0]
    assert token_logprobs(logits[:0], ids[:0], 2) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_ends_its_request_alone(bad: float) -> None:
    kinds = [SamplingParams(temperature=0), SamplingParams(seed=3), SamplingParams(temperature=0)]
    logits = rows(3)
    expected, _, _ = sampler(*((p, [3, 4], 2) for p in kinds))(logits.clone(), [1, 2, 3], [2] * 3)
    logits[1, 13] = bad
    ids, _, errors = sampler(*((p, [3, 4], 2) for p in kinds))(logits, [1, 2, 3], [2] * 3)
    assert list(errors) == [2]
    assert "non-finite" in errors[2]
    assert ids[[0, 2]].tolist() == expected[[0, 2]].tolist()


@pytest.mark.parametrize("method", ["__init__", "apply"])
def test_parameters_that_break_end_their_request_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(LogitAdjuster, method, breaks)
    kinds = [SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias={3: 1.0})]
    logits = rows(2)
    ids, _, errors = sampler(*((p, [3, 4], 2) for p in kinds))(logits.clone(), [1, 2], [2] * 2)
    assert list(errors) == [2]
    assert "broken" in errors[2]
    assert int(ids[0]) == int(logits[0].argmax())


def test_a_reused_slot_forgets_the_last_request() -> None:
    s = sampler((SamplingParams(seed=1, top_k=3, logit_bias={5: 50.0}, logprobs=1), [3], 1))
    admit(s, 1, SamplingParams(temperature=0), [3])
    logits = rows(1)
    ids, logprobs, _ = s(logits.clone(), [1], [1])
    assert int(ids[0]) == int(logits.argmax())
    assert logprobs == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2),
        ("min_p", 2.0), ("max_tokens", -1), ("min_tokens", -1), ("presence_penalty", 3.0), ("repetition_penalty", 0.0),
        ("logprobs", 1000), ("stop", ("",)), ("stop", ("x",) * 100), ("logit_bias", {3: math.inf}),
        ("logit_bias", {-1: 1.0}), ("seed", 2**70), ("logprobs", True), ("max_tokens", 1.5), ("top_k", 2.5),
        ("temperature", "a"), ("temperature", None), ("seed", 1.5), ("stop", b"x"), ("stop", (1,)), ("ignore_eos", 1),
        ("stop_token_ids", "12"), ("logit_bias", [1]),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field) as e:
        SamplingParams(**{field: value})
    assert "\n" not in str(e.value)


def test_rows_on_the_device_alone_choose_the_same() -> None:
    kinds = [SamplingParams(temperature=0), SamplingParams(seed=7), SamplingParams(seed=8, temperature=0.5)]
    s = sampler(*((p, [3, 4], 2) for p in kinds))
    logits = rows(3, seed=9)
    expected, _, _ = s(logits.clone(), [1, 2, 3], [4, 5, 6])
    assert s.simple([1, 2, 3])
    assert s.sample_rows(logits, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])).tolist() == expected.tolist()
    logits[1, 3] = math.nan
    assert s.sample_rows(logits, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])).tolist()[1] == -1
    admit(s, 2, SamplingParams(top_k=3), [3])
    assert not s.simple([1, 2, 3])
    assert s.simple([1, 3])


def test_stop_takes_what_people_pass() -> None:
    assert SamplingParams(stop="abc").stop == ("abc",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=[3]).stop_token_ids == (3,)  # type: ignore[arg-type]
