"""Tokens that go to experts of other ranks and back by peer memory, in CUDA C++: kernels of several ranks run on the
host, side by side, and compiled for Hopper; results of devices are in tests/dist/test_gpu_all_reduce.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.compile_cuda import compile_cuda
from tests.ops.run_on_host import HostKernel
from tests.ops.test_cuda_all_reduce import MORE, REST, HostRanks
from thalweg.ops.moe.exchange import Gathered, cuda, reference


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 6)


class Ranks(HostRanks):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        for rank in self.ranks:
            rank.rank, rank.size = rank.tp_rank, rank.tp_size


def together(rank: int, xs: list[Tensor]) -> Any:
    """A rank whose collectives give what all have, for the reference."""
    asked = iter(xs)
    return SimpleNamespace(rank=rank, size=len(xs), gather=lambda x: next(asked), all_to_all=lambda x, *_: next(asked))


def expected(rank: int, x: Tensor, weights: Tensor, slots: Tensor, live: Tensor, here: int, shared: int) -> Gathered:
    slots_of_live = torch.where(live.unsqueeze(-1) != 0, slots, -1).int()
    routing = torch.cat([slots_of_live, weights.view(torch.int32)], -1).flatten(0, 1)
    ranks = together(rank, [x.flatten(0, 1), routing])
    ranks.size = len(x)
    return reference.dispatch(x[rank], weights[rank], slots[rank], live[rank], ranks, here=here, shared=shared)


@pytest.mark.parametrize(
    ("size", "T", "D", "shared"),
    [(2, 2, 1032, 1), (3, 3, 16, 0), *(pytest.param(size, 3, 1032, 1, marks=REST) for size in MORE)],
)
def test_tokens_of_all_ranks_and_what_they_take_here(size: int, T: int, D: int, shared: int) -> None:
    of_host, here = Ranks(size), 4
    for _ in range(3):
        x, k = torch.randn(size, T, D).bfloat16(), 3 + shared
        weights, live = torch.rand(size, T, k), torch.randint(0, 2, (size, T)) * 7
        slots = torch.rand(size, T, size * here).topk(k).indices

        def dispatch(r: Any, x: Tensor = x, w: Tensor = weights, s: Tensor = slots, live: Tensor = live) -> Any:
            return cuda.dispatch(x[r.rank], w[r.rank], s[r.rank], live[r.rank], r, here=here, shared=shared)

        for rank, gathered in enumerate(of_host.run(dispatch)):
            want = expected(rank, x, weights, slots, live, here, shared)
            assert all(torch.equal(a, b) for a, b in zip(gathered, want, strict=True))


@pytest.mark.parametrize(
    ("size", "D", "k", "wide", "ways"),
    [
        (2, 1032, 4, True, 2),
        (2, 264, 0, False, 1),
        (3, 264, 2, False, 2),
        (2, 264, 3, True, 1),
        *(pytest.param(size, 264, 4, size == 8, size // 2, marks=REST) for size in MORE),
    ],
)
def test_what_the_ranks_give_comes_back(
    size: int, D: int, k: int, wide: bool, ways: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_host, T = Ranks(size), 2
    monkeypatch.setattr(cuda, "AT_ONCE", T * cuda.chunks_of(D) * cuda.threads_of(D) * ways)
    for turn in range(3):
        residual = torch.randn(size, T, D + 8).bfloat16()[..., :D]
        parts = torch.randn(size, size * T * max(k, 1), D).to(torch.float32 if wide else torch.bfloat16)
        weights = torch.rand(size, size * T, k) * torch.randint(0, 2, (size, size * T, k)) if k else None
        if weights is not None:
            parts[weights.view(size, -1) == 0] = torch.nan  # left out, so it may be anything

        own = torch.randn(size, T, D) if turn else None

        def combine(r: Any, x: Tensor = residual, p: Tensor = parts, w: Any = weights, own: Any = own) -> Tensor:
            options = {"weights_Ak": w, "own_TD": own}
            return cuda.combine(
                x[r.rank], p[r.rank], r, **{k: v if v is None else v[r.rank] for k, v in options.items()}
            )

        given = parts.float().view(size, size, T, max(k, 1), D)  # by, to
        if weights is not None:
            given = torch.nan_to_num(given) * weights.view(size, size, T, k, 1)
        sums = given.sum(3).bfloat16().float().sum(0)
        for rank, y in enumerate(of_host.run(combine)):
            want = residual[rank].float() + sums[rank] + (0.0 if own is None else own[rank])
            torch.testing.assert_close(y, want.bfloat16(), atol=0.02, rtol=0.01)


@pytest.mark.parametrize(("ranks", "wide", "ways"), [(2, 1, 2), (8, 0, 8), (8, 1, 8), (8, 1, 1)])
def test_they_compile_for_hopper(ranks: int, wide: int, ways: int, tmp_path: Path) -> None:
    dispatch = {"D": 2304, "K": 8, "SHARED": 1, "HERE": 128, "BLOCK": 256 if ranks == 2 else 128}
    compiled = compile_cuda(cuda.DISPATCH, tmp_path, RANKS=ranks, RANK=1, **dispatch)
    assert compiled.spilled_bytes == 0
    assert compiled.registers <= 32
    combine = {"D": 2304, "PARTS": 9, "WEIGHTED": 1, "WIDE": wide, "OWN": wide, "BLOCK": 128, "WAYS": ways}
    compiled = compile_cuda(cuda.COMBINE, tmp_path, RANKS=ranks, RANK=1, **combine)
    assert compiled.spilled_bytes == 0
