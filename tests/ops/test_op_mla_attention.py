"""Latent attention over blocks, against per-query float64 attention on the plain list of latents."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thalweg.ops.attention.mla import reference
from thalweg.ops.attention.mla.reference import mla_decode, mla_prefill, mla_write

H, K, P, R, V, BLOCK_SIZE = 3, 8, 4, 12, 10, 4
C = R + P
SCALE = (K + P) ** -0.5


class Sequences:
    """Random latents of some sequences in shuffled blocks; every row that is not theirs holds NaN or inf."""

    def __init__(self, lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.latents = [torch.randn(n, C, generator=rng).to(dtype) for n in lengths]
        self.w_uk = torch.randn(H, K, R, generator=rng).to(dtype)
        self.w_uv = torch.randn(H, V, R, generator=rng).to(dtype)
        counts = [-(-n // BLOCK_SIZE) for n in lengths]
        width = max(1, *counts) + 1
        free = torch.randperm(sum(counts) + 2, generator=rng).tolist()
        self.blocks = torch.full((len(free), BLOCK_SIZE, C), torch.nan, dtype=dtype)
        self.blocks[:, 1::2] = torch.inf
        self.tables = torch.zeros(len(lengths), width, dtype=torch.int32)
        for b, latent in enumerate(self.latents):
            self.tables[b] = free[-1]  # entries past the end: any valid block, here a stale one
            for i in range(counts[b]):
                self.tables[b, i] = free.pop(0)
            rows = torch.tensor(
                [int(self.tables[b, t // BLOCK_SIZE]) * BLOCK_SIZE + t % BLOCK_SIZE for t in range(len(latent))]
            )
            mla_write(latent, self.blocks, rows.long())

    def q(self, T: int, seed: int = 1) -> Tensor:
        q = torch.randn(T, H, K + P, generator=torch.Generator().manual_seed(seed))
        return q.to(self.blocks.dtype)

    def absorbed(self, q_THX: Tensor) -> Tensor:
        nope, rope = q_THX.double().split((K, P), dim=-1)
        return torch.cat((torch.einsum("thk,hkr->thr", nope, self.w_uk.double()), rope), -1)

    def truth(self, q_HX: Tensor, b: int, visible: int) -> Tensor:
        """[H, V] in float64 of one query over the first `visible` tokens of sequence b."""
        latent = self.latents[b][:visible].double()
        out = []
        for h in range(H):
            keys = torch.cat((latent[:, :R] @ self.w_uk[h].double().t(), latent[:, R:]), dim=-1)
            p = ((keys @ q_HX[h].double()) * SCALE).softmax(0)
            out.append(p @ (latent[:, :R] @ self.w_uv[h].double().t()))
        return torch.stack(out)


def prefill(s: Sequences, new: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    offsets = [sum(new[:b]) for b in range(len(new) + 1)]
    q = s.q(offsets[-1])
    prefixes = [len(latent) - n for latent, n in zip(s.latents, new, strict=True)]
    return q, attend(s, q, prefixes, offsets), offsets


def attend(s: Sequences, q: Tensor, prefixes: list[int], offsets: list[int]) -> Tensor:
    where = dict(block_tables_BN=s.tables, context_lens=prefixes, offsets=offsets)
    up = torch.cat((s.w_uk, s.w_uv), dim=1)
    return mla_prefill(q, s.blocks, **where, up_HXR=up, value_dims=V, scale=SCALE)


def check_prefill(s: Sequences, new: list[int], tolerance: float = 1e-5) -> None:
    q, out, offsets = prefill(s, new)
    assert out.shape == (offsets[-1], H, V)
    for b, n in enumerate(new):
        for i in range(n):
            t = offsets[b] + i
            expected = s.truth(q[t], b, len(s.latents[b]) - n + i + 1)
            torch.testing.assert_close(out[t].double(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 19), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_decode_of_any_contexts(lengths: list[int], seed: int) -> None:
    s = Sequences(lengths, seed)
    q = s.q(len(lengths))
    out = mla_decode(s.absorbed(q).float(), s.blocks, s.tables, torch.tensor(lengths, dtype=torch.int32), SCALE, R)
    assert out.shape == (len(lengths), H, R)
    for b, n in enumerate(lengths):
        values = torch.einsum("hr,hvr->hv", out[b].double(), s.w_uv.double())
        torch.testing.assert_close(values, s.truth(q[b], b, n), rtol=1e-4, atol=1e-4)


def test_decode_in_parts_when_contexts_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Sequences([9, 3, 19, 1, 8])
    q = s.absorbed(s.q(5)).float()
    lengths = [len(latent) for latent in s.latents]
    whole = mla_decode(q, s.blocks, s.tables, torch.tensor(lengths, dtype=torch.int32), SCALE, R)
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 200)
    torch.testing.assert_close(
        mla_decode(q, s.blocks, s.tables, torch.tensor(lengths, dtype=torch.int32), SCALE, R),
        whole,
        rtol=1e-5,
        atol=1e-6,
    )


def test_decode_of_an_empty_context_gives_zeros() -> None:
    s = Sequences([5, 0])
    out = mla_decode(s.absorbed(s.q(2)).float(), s.blocks, s.tables, torch.tensor([5, 0], dtype=torch.int32), SCALE, R)
    assert torch.isfinite(out).all()
    assert torch.equal(out[1], torch.zeros(H, R))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    spans=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_prefill_of_any_prefixes_and_lengths(spans: list[tuple[int, int]], seed: int) -> None:
    check_prefill(Sequences([prefix + new for prefix, new in spans], seed), [new for _, new in spans])


@pytest.mark.parametrize("elements", [1, 700, 1500])
def test_prefill_in_blocks_of_keys(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_ELEMENTS", elements)
    check_prefill(Sequences([37, 5, 22]), [30, 5, 1])


def test_running_softmax_survives_scores_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later keys outscore earlier ones by hundreds: earlier blocks must be scaled away without overflow."""
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 1)
    s = Sequences([24])
    rows = torch.tensor([int(s.tables[0, t // BLOCK_SIZE]) * BLOCK_SIZE + t % BLOCK_SIZE for t in range(24)])
    s.latents[0] = s.latents[0] * torch.linspace(1, 60, 24)[:, None]
    mla_write(s.latents[0], s.blocks, rows)
    check_prefill(s, [24], tolerance=1e-4)


def test_prefill_in_pieces_equals_whole() -> None:
    s = Sequences([23])
    q, whole, _ = prefill(s, [23])
    cuts = [0, 1, 9, 16, 23]
    pieces = [attend(s, q[a:b], [a], [0, b - a]) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-6)


def test_bf16_rounds_once_at_the_end() -> None:
    s = Sequences([21, 6], dtype=torch.bfloat16)
    _, out, _ = prefill(s, [21, 2])
    assert out.dtype == torch.bfloat16
    check_prefill(s, [21, 2], tolerance=2**-8)


def test_write_touches_only_its_rows_and_converts() -> None:
    blocks = torch.full((3, BLOCK_SIZE, C), torch.nan, dtype=torch.bfloat16)
    latent = torch.randn(2, C)
    mla_write(latent, blocks, torch.tensor([9, 2]))
    flat = blocks.view(-1, C)
    assert torch.equal(flat[[9, 2]], latent.bfloat16())
    assert torch.isnan(flat[[i for i in range(12) if i not in (9, 2)]]).all()
