"""Gated attention of grouped heads against float64 for each query, over poisoned blocks of any size."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.gqa_case import SHAPES, GqaCase, GqaShape, assert_near
from thalweg.models.parts.rope import RopeDims, Yarn
from thalweg.ops.attention.gqa import library, reference
from thalweg.ops.attention.gqa.reference import gqa_decode, gqa_prefill, gqa_prepare

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
CONTEXTS = [0, 1, 6, 14, 15, 16, 40]  # tokens cached before a decode row
CACHED, NEW = [0, 5, 0, 33, 16, 0], [1, 20, 0, 1, 16, 50]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode(shape: GqaShape, dtype: torch.dtype) -> None:
    case = GqaCase(shape, CONTEXTS, [1] * len(CONTEXTS), dtype)
    q = case.check_prepare(gqa_prepare, TOLERANCE[dtype])
    assert_near(case.decode(gqa_decode, q), case.truth()[1], TOLERANCE[dtype])


@pytest.mark.parametrize("prefill", [gqa_prefill, library.gqa_prefill], ids=["reference", "library"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_prefill_after_a_cached_prefix(prefill, shape: GqaShape, dtype: torch.dtype) -> None:
    case = GqaCase(shape, CACHED, NEW, dtype)
    q = case.check_prepare(gqa_prepare, TOLERANCE[dtype])
    assert_near(case.prefill(prefill, q), case.truth()[1], TOLERANCE[dtype])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    spans=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4), seed=st.integers(0, 9)
)
def test_prefill_of_any_spans(spans: list[tuple[int, int]], seed: int) -> None:
    case = GqaCase(SHAPES[0], [a for a, _ in spans], [b for _, b in spans], seed=seed)
    q = case.prepare(gqa_prepare)
    expected = case.truth()[1]
    for form in (gqa_prefill, library.gqa_prefill):
        assert_near(case.prefill(form, q), expected, 2e-5)


@pytest.mark.parametrize("most", [1, 200, 1000])
def test_prefill_in_pieces_of_queries(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_SCORES", most)
    case = GqaCase(SHAPES[0], CACHED, NEW)
    q = case.prepare(gqa_prepare)
    assert_near(case.prefill(gqa_prefill, q), case.truth()[1], 2e-5)


@pytest.mark.parametrize("prefill", [gqa_prefill, library.gqa_prefill], ids=["reference", "library"])
def test_a_prompt_in_chunks_equals_the_whole(prefill) -> None:
    case = GqaCase(SHAPES[0], [0], [50])
    q = case.prepare(gqa_prepare)
    whole = case.prefill(prefill, q)
    pieces = [
        prefill(q[a:b], case.proj[a:b], **case.blocks, starts=[a], offsets=[0, b - a])
        for a, b in pairwise((0, 1, 8, 33, 50))
    ]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_scores_far_apart(spread: float) -> None:
    """Norm weights make scores equal (0), ordinary, or hundreds apart."""
    case = GqaCase(SHAPES[3], [40, 3], [1, 1], spread=spread)
    q = case.prepare(gqa_prepare)
    assert_near(case.decode(gqa_decode, q), case.truth()[1], 2e-4)
    case = GqaCase(SHAPES[3], [0, 9], [30, 20], spread=spread)
    q = case.prepare(gqa_prepare)
    for form in (gqa_prefill, library.gqa_prefill):
        assert_near(case.prefill(form, q), case.truth()[1], 2e-4)


def test_rows_that_share_the_sink() -> None:
    """Padding rows write to the sink's first row and have a context of 0 or 1: finite, and nothing else changes."""
    case = GqaCase(SHAPES[0], [5, 9, 3, 0], [1] * 4)
    alone = GqaCase(SHAPES[0], [5, 9, 3, 0], [1] * 4)
    q = alone.prepare(gqa_prepare)
    expected = alone.decode(gqa_decode, q)
    case.rows[2:], case.tables[2:], case.positions[2:] = 0, 0, 0
    q = case.prepare(gqa_prepare)
    for n in (0, 1):
        lens = torch.tensor([6, 10, n, n], dtype=torch.int32)
        out = gqa_decode(q, case.proj, **case.blocks, context_lens_B=lens)
        assert torch.equal(out[:2], expected[:2])
        assert out.isfinite().all()


def test_nothing_to_do() -> None:
    case = GqaCase(SHAPES[0], [4], [0])
    before = case.keys.clone()
    q = case.prepare(gqa_prepare)
    assert q.shape == (0, 6, 24)
    assert torch.equal(case.keys.view(torch.int32), before.view(torch.int32))
    for form in (gqa_prefill, library.gqa_prefill):
        assert case.prefill(form, q).shape == (0, 6 * 24)
    assert gqa_decode(q, case.proj, **case.blocks, context_lens_B=torch.empty(0, dtype=torch.int32)).shape == (0, 144)


@pytest.mark.parametrize("first", [100, 30_000, 1_000_000])
def test_positions_far_out(first: int) -> None:
    case = GqaCase(GqaShape(4, 2, 32, 16, 16), [0], [9], first_position=first, scale=1.139)
    case.check_prepare(gqa_prepare, 1e-4)


def test_rounding_comes_after_the_rotation() -> None:
    """Nothing is rounded between norm and rotation: bf16 is the float32 result, rounded once."""
    narrow = GqaCase(SHAPES[3], [0], [9], torch.bfloat16)
    wide = GqaCase(SHAPES[3], [0], [9])
    wide.proj = narrow.proj.float()
    assert torch.equal(narrow.prepare(gqa_prepare), wide.prepare(gqa_prepare).bfloat16())
    G, K = 2, 32
    keys = [case.keys.view(-1, G, K)[case.rows] for case in (narrow, wide)]
    assert torch.equal(keys[0], keys[1].bfloat16())


def yarn_by_the_paper(dims: int, theta: float, factor: float, original: int) -> list[float]:
    """arXiv:2309.00071, section 3.2: by how often a wave turns within the original context, in whole pairs."""
    found = []
    bounds = [dims / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta) for turns in (32, 1)]
    low, high = math.floor(bounds[0]), math.ceil(bounds[1])
    for i in range(dims // 2):
        f = theta ** (-2 * i / dims)
        stretched = min(1.0, max(0.0, (i - low) / (high - low)))
        found.append((1 - stretched) * f + stretched * f / factor)
    return found


def test_plain_rotation_of_a_part() -> None:
    rope = RopeDims(64, 1e7)
    assert rope.frequencies == pytest.approx([1e7 ** (-i / 32) for i in range(32)])
    assert rope.scale == 1.0


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_yarn_stretches_qwens_context(factor: float) -> None:
    """The recipe for a million tokens: 64 rotated dims, theta 1e7, 262,144 tokens stretched."""
    rope = RopeDims(64, 1e7, Yarn(factor, 262_144))
    found, plain = rope.frequencies, RopeDims(64, 1e7).frequencies
    assert found == pytest.approx(yarn_by_the_paper(64, 1e7, factor, 262_144), rel=1e-12)
    assert rope.scale == pytest.approx(0.1 * math.log(factor) + 1)
    turns = [262_144 * f / (2 * math.pi) for f in plain]
    for f, p, n in zip(found, plain, turns, strict=True):
        if n > 64:  # waves that turn often are left alone, those that never turn are stretched by all of the factor
            assert f == p
        if n < 0.5:
            assert f == pytest.approx(p / factor)
    assert any(p / factor < f < p for f, p in zip(found, plain, strict=True))
