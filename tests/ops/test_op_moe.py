"""Routing and experts against loops over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thalweg.errors import ConfigError
from thalweg.ops.moe.experts import reference
from thalweg.ops.moe.router.reference import route
from thalweg.quant import PLAIN

E, D, I = 8, 10, 6


def naive_route(
    scores: list[float], bias: list[float], top_k: int, n_group: int, topk_group: int
) -> tuple[list[int], list[float]]:
    """Experts of one token, best first, and their unbiased scores."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // n_group
    groups = [range(i * size, (i + 1) * size) for i in range(n_group)]
    best = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))[:topk_group]
    allowed = [e for g in (best if n_group > 1 else groups) for e in g]
    ids = sorted(allowed, key=lambda e: -biased[e])[:top_k]
    return ids, [scores[e] for e in ids]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    top_k=st.integers(1, 4),
    groups=st.sampled_from([(1, 1), (4, 2), (2, 1), (8, 4)]),
    renormalize=st.booleans(),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    seed=st.integers(0, 99),
)
def test_route(top_k: int, groups: tuple[int, int], renormalize: bool, scoring: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(5, E, generator=rng), torch.randn(E, generator=rng)
    weights, ids = route(logits, bias, top_k, renormalize, 2.5, scoring, *groups)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int64
    scores = logits.double().sigmoid() if scoring == "sigmoid" else logits.double().softmax(-1)
    for t in range(5):
        expected_ids, expected = naive_route(scores[t].tolist(), bias.double().tolist(), top_k, *groups)
        assert ids[t].tolist() == expected_ids
        total = sum(expected) if renormalize else 1.0
        assert weights[t].tolist() == pytest.approx([2.5 * w / total for w in expected], rel=1e-5)


def test_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, -3.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 10.0, 0.0])
    weights, ids = route(logits, bias, 2, False, 1.0)
    assert ids.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [2, 0]])


def test_negative_biased_scores_in_a_kept_group_beat_dropped_groups() -> None:
    """Dropped groups are out for good: a kept expert below zero still comes before them."""
    bias = torch.tensor([5.0, 5.0, -9.0, -9.0, 0.0, 0.0, 0.0, 0.0])
    _, ids = route(torch.zeros(1, E), bias, 4, True, 1.0, n_group=2, topk_group=1)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3]


def test_scores_that_vanish_do_not_divide_by_zero() -> None:
    weights, _ = route(torch.full((1, E), -200.0), torch.zeros(E), 2, True, 1.0)
    assert torch.equal(weights, torch.zeros(1, 2))


def test_unknown_scoring_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'relu'.*expected 'sigmoid' or 'softmax'"):
        route(torch.zeros(1, E), torch.zeros(E), 2, True, 1.0, "relu")


def experts(x: Tensor, weights: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    return reference.experts(PLAIN, x, weights, ids, (w_gate_up,), (w_down,))


def naive_experts(x: Tensor, weights: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    x, weights, w_gate_up, w_down = (a.double() for a in (x, weights, w_gate_up, w_down))
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up = w_gate_up[e, :I] @ x[t], w_gate_up[e, I:] @ x[t]
            out[t] += w * (w_down[e] @ (F.silu(gate) * up))
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(T=st.integers(0, 20), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_experts(T: int, k: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(T, D, generator=rng), torch.rand(T, k, generator=rng)
    ids = torch.rand(T, E, generator=rng).argsort(dim=-1)[:, :k]
    w_gate_up = torch.randn(E, 2 * I, D, generator=rng)
    w_down = torch.randn(E, D, I, generator=rng)
    unused = [e for e in range(E) if e not in ids]
    w_gate_up[unused] = torch.nan
    w_down[unused] = torch.nan
    out = experts(x, weights, ids, w_gate_up, w_down)
    torch.testing.assert_close(out.double(), naive_experts(x, weights, ids, w_gate_up, w_down), rtol=1e-4, atol=1e-4)


def test_experts_in_bf16() -> None:
    rng = torch.Generator().manual_seed(0)
    x, weights = torch.randn(7, D, generator=rng).bfloat16(), torch.rand(7, 2, generator=rng)
    ids = torch.rand(7, E, generator=rng).argsort(dim=-1)[:, :2]
    w_gate_up = torch.randn(E, 2 * I, D, generator=rng).bfloat16()
    w_down = torch.randn(E, D, I, generator=rng).bfloat16()
    out = experts(x, weights, ids, w_gate_up, w_down)
    assert out.dtype == torch.bfloat16
    expected = naive_experts(x, weights, ids, w_gate_up, w_down)
    assert float((out.double() - expected).norm() / expected.norm()) < 0.01


def test_a_poisoned_token_does_not_reach_the_others() -> None:
    x = torch.randn(4, D)
    x[2] = torch.nan
    ids = torch.zeros(4, 1, dtype=torch.int64)
    out = experts(x, torch.ones(4, 1), ids, torch.randn(E, 2 * I, D), torch.randn(E, D, I))
    assert torch.isnan(out[2]).all()
    assert torch.isfinite(out[[0, 1, 3]]).all()
