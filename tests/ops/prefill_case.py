"""Random arguments of prefill ops: several sequences in one call, slots that are named and others that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thalweg.ops.delta.kda.reference import kda_gate, recurrent_kda
from thalweg.ops.host_tables import Limits, StepSequences, Tables


class KdaCase:
    """Arguments of kda_prefill for sequences of `lengths`; slots that no sequence has hold NaN."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        H: int,
        K: int,
        V: int,
        dtype: torch.dtype,
        device: str = "cpu",
        gate: float | None = None,
        fresh: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        rng = torch.Generator().manual_seed(sum(lengths) + H)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        self.offsets = list(accumulate(lengths, initial=0))
        T, B = self.offsets[-1], len(lengths)
        f = randn(T, H, K) if gate is None else gate * randn(T, H, K).sign()
        qkv = randn(T, H, 2 * K + V).to(dtype).to(device)
        self.q, self.k, self.v = qkv.split([K, K, V], dim=-1)
        self.g = kda_gate(f, randn(H), randn(H, K)).to(device)
        self.beta = randn(T, H).sigmoid().to(device)
        self.slots = torch.randperm(2 * B, generator=rng)[:B].to(device)
        state = torch.full((2 * B, H, V, K), torch.nan)
        state[self.slots.cpu()] = 0.0 if fresh else randn(B, H, V, K)
        self.state = state.to(device, state_dtype)
        self.before = self.state.clone()

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        """What `op` gives; it moves the states on."""
        inputs = (self.q, self.k, self.v, self.g, self.beta)
        return op(*inputs, state_NHVK=self.state, slots_B=self.slots, offsets=self.offsets)

    def check(self, o_THV: Tensor, tolerance: float, state_tolerance: float | None = None) -> None:
        """Against the recurrence in float64, each sequence by itself; nothing else may have changed."""
        assert o_THV.dtype == self.v.dtype
        for (start, end), slot in zip(pairwise(self.offsets), self.slots.tolist(), strict=True):
            after, before = self.state[slot], self.before[slot]
            if start == end:
                assert torch.equal(after, before)
                continue
            inputs = [x[None, start:end].transpose(1, 2).double() for x in (self.q, self.k, self.v, self.g, self.beta)]
            o, S = recurrent_kda(*inputs, before[None].transpose(-1, -2).double())
            assert ratio(o_THV[start:end], o[0].transpose(0, 1)) < tolerance, end - start
            assert ratio(after, S[0].transpose(-1, -2)) < (state_tolerance or tolerance), end - start
        others = torch.ones(len(self.state), dtype=torch.bool, device=self.state.device)
        others[self.slots] = False
        assert self.state[others].isnan().all()


def ratio(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def conv_case(
    lengths: tuple[int, ...], C: int, W: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
    """Arguments of conv1d_prefill; x is part of a wider matrix, and slots that no sequence has hold NaN."""
    rng = torch.Generator().manual_seed(sum(lengths))
    offsets, B = list(accumulate(lengths, initial=0)), len(lengths)
    x = torch.randn(offsets[-1], C + 24, generator=rng).to(device, dtype)[:, 8 : 8 + C]
    slots = torch.randperm(2 * B, generator=rng)[:B]
    state = torch.full((2 * B, W, C), torch.nan)
    state[slots] = torch.randn(B, W, C, generator=rng)
    weight = torch.randn(C, W + 1, generator=rng)
    return x, state.to(device, dtype), slots.to(device), offsets, weight.to(device, dtype)


def mla_case(
    cached: list[int], new: list[int], dtype: torch.dtype, device: str = "cpu", H: int = 2, K: int = 16, P: int = 16,
    V: int = 32, R: int = 24, block_size: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of mla_prefill by name; rows of blocks that hold no token of theirs are NaN."""
    rng = torch.Generator().manual_seed(sum(cached) + 7 * sum(new))
    totals = [a + b for a, b in zip(cached, new, strict=True)]
    N = max(1, -(-max(totals) // block_size))
    tables = (torch.randperm(len(new) * N, generator=rng) + 1).view(len(new), N)
    blocks = torch.full((len(new) * N + 1, block_size, R + P), torch.nan)
    for row, total in zip(tables, totals, strict=True):
        positions = torch.arange(total)
        blocks[row[positions // block_size], positions % block_size] = torch.randn(total, R + P, generator=rng)
    offsets = list(accumulate(new, initial=0))
    q = torch.randn(offsets[-1], H, K + P, generator=rng)
    w = (torch.randn(H, K + V, R, generator=rng) * R**-0.5).to(device, dtype)
    return dict(
        q_THX=q.to(device, dtype),
        blocks_MSC=blocks.to(device, dtype),
        block_tables_BN=tables.int().to(device),
        context_lens=cached,
        offsets=offsets,
        up_HXR=w,
        value_dims=V,
        scale=(K + P) ** -0.5,
    )


Boundary = tuple[int, int, int]
Run = Callable[[Sequence[int], Sequence[int], Sequence[Boundary]], list[Tensor]]


def check_in_graphs(run: Run, steps: Sequence[StepSequences], context: int, device: str = "cpu") -> None:
    """That an op gives the same for tables at fixed addresses, which are all that it may look at once it is captured.

    `run(offsets, starts, boundaries)` is the op over the tokens of `steps`, which have as many sequences and tokens,
    and gives whatever it computes or changes.
    """
    offsets = steps[0].offsets
    limits = Limits(len(offsets) - 1, offsets[-1], context)
    tables = Tables(limits, torch.zeros(Tables.words(limits), dtype=torch.int32, device=device))
    run(tables.offsets, tables.starts, tables.boundaries)  # of another step
    image = np.zeros(Tables.words(limits), dtype=np.int32)
    for step in steps:
        tables.fill(step, image)
        tables._memory.copy_(torch.from_numpy(image))
        tables.frozen = True
        found = run(tables.offsets, tables.starts, tables.boundaries)
        tables.frozen = False
        for got, expected in zip(found, run(*step), strict=True):
            assert torch.equal(got, expected)


def check_boundaries(
    run: Callable[[slice, list[int], list[int], Tensor, list[Boundary]], Tensor], state: Tensor
) -> None:
    """That an op writes states at boundaries, and goes on, as though its call had ended there, to the bit.

    `run(tokens, slots, offsets, state, boundaries)` runs the op over a part of 3 sequences' tokens: 200, 128 and 70 of
    them, in slots 1 to 3 of `state`, which has 9.
    """
    lengths = [200, 128, 70]
    offsets = list(accumulate(lengths, initial=0))
    boundaries = [(0, 64, 5), (0, 192, 6), (1, 128, 7), (2, 64, 8)]
    whole, before = state.clone(), state.clone()
    out = run(slice(0, offsets[-1]), [1, 2, 3], offsets, whole, boundaries)
    plain = state.clone()
    close = dict(rtol=1e-4, atol=1e-5) if state.dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(run(slice(0, offsets[-1]), [1, 2, 3], offsets, plain, []), out, **close)
    for b, cuts in enumerate(([64, 192, 200], [128], [64, 70])):
        own, start = before.clone(), 0
        for end in cuts:
            tokens = slice(offsets[b] + start, offsets[b] + end)
            part = run(tokens, [b + 1], [0, end - start], own, [])
            assert torch.equal(part, out[tokens])
            for _, n, slot in (each for each in boundaries if each[:2] == (b, end)):
                assert torch.equal(whole[slot], own[b + 1]), (b, n)
            start = end
        assert torch.equal(whole[b + 1], own[b + 1])
    for untouched in (0, 4):
        assert torch.equal(whole[untouched], before[untouched])


def kda_boundaries(op: Callable[..., Tensor], device: str, dtype: torch.dtype, H: int = 2, K: int = 32) -> None:
    """Op "kda_prefill" at boundaries."""
    rng = torch.Generator().manual_seed(1)
    q, k, v, f = (torch.randn(398, H, K, generator=rng) for _ in range(4))
    g = kda_gate(f, torch.randn(H, generator=rng), torch.randn(H, K, generator=rng)).to(device)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    beta = torch.randn(398, H, generator=rng).sigmoid().to(device)

    def run(tokens: slice, slots: list[int], offsets: list[int], state: Tensor, boundaries: list[Boundary]) -> Tensor:
        inputs = (x[tokens] for x in (q, k, v, g, beta))
        where = dict(state_NHVK=state, slots_B=torch.tensor(slots, device=device), offsets=offsets)
        return op(*inputs, **where, boundaries=boundaries)

    check_boundaries(run, torch.randn(9, H, K, K, generator=rng).to(device))


def conv_boundaries(op: Callable[..., Tensor], device: str, dtype: torch.dtype, C: int = 40, W: int = 3) -> None:
    """Op "conv1d_prefill" at boundaries."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(398, C, generator=rng).to(device, dtype)
    weight = torch.randn(C, W + 1, generator=rng).to(device, dtype)

    def run(tokens: slice, slots: list[int], offsets: list[int], state: Tensor, boundaries: list[Boundary]) -> Tensor:
        return op(x[tokens], state, torch.tensor(slots, device=device), offsets, weight, boundaries=boundaries)

    check_boundaries(run, torch.randn(9, W, C, generator=rng).to(device, dtype))
