"""Tokens that go to experts of other ranks and back by peer memory, in CUDA C++: kernels of several ranks run on the
host, side by side, and compiled for Hopper; results of devices are in tests/dist/test_gpu_all_reduce.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.compile_cuda import compile_cuda
from tests.ops.run_on_host import HostKernel
from tests.ops.test_cuda_all_reduce import MORE, REST, HostRanks
from thalweg.ops.moe.exchange import cuda, reference


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 6)
    monkeypatch.setattr(cuda, "MANY_THREADS", 32)
    monkeypatch.setattr(cuda, "MANY", {**cuda.MANY, "BLOCK": 32})


class Ranks(HostRanks):
    def __init__(self, size: int, blocks: int) -> None:
        super().__init__(size, (3, 32 * 5 * 16), blocks)
        for rank in self.ranks:
            rank.rank, rank.size = rank.tp_rank, rank.tp_size


def together(rank: int, xs: list[Tensor]) -> Any:
    """A rank whose collectives give what all have, for the reference."""
    asked = iter(xs)
    return SimpleNamespace(rank=rank, size=len(xs), gather=lambda x: next(asked), all_to_all=lambda x, *_: next(asked))


def expected(rank: int, live: Tensor, x: list[Tensor], weights: list[Tensor], slots: list[Tensor], **sizes: int) -> Any:
    of_live = [torch.where(each[: len(s), None] != 0, s, -1).int() for each, s in zip(live, slots, strict=True)]
    routing = [torch.cat([s, w.view(torch.int32)], -1) for s, w in zip(of_live, weights, strict=True)]
    rows = len(live[0])
    ranks = together(rank, [padded(x, rows, 0), padded(routing, rows, -1)])
    ranks.size = len(x)
    return reference.dispatch(live[rank], x[rank], weights[rank], slots[rank], ranks, **sizes)


def padded(tensors: list[Tensor], rows: int, value: int) -> Tensor:
    return torch.cat([F.pad(t, (0, 0, 0, rows - len(t)), value=value) for t in tensors])


TOKENS = [(3, 3, 3), (1, 3, 0), (2, 0, 3), (0, 0, 0)]  # of the first ranks; the others have none


@pytest.mark.parametrize(
    ("size", "D", "shared", "blocks", "many"),
    [
        (2, 1032, 1, 16, False),
        (3, 16, 0, 2, False),
        (2, 2560, 1, 1, True),
        (3, 1032, 0, 1, True),
        *(pytest.param(size, 1032, 1, 16, many, marks=REST) for size in MORE for many in (False, True)),
    ],
)
def test_tokens_of_all_ranks_and_what_they_take_here(size: int, D: int, shared: int, blocks: int, many: bool) -> None:
    """Of ranks with as many tokens and others, in one launch or, for as much as there is room for, in two."""
    of_host, here, k, R = Ranks(size, blocks), 4, 3 + shared, 3
    for counts in TOKENS:
        T = [*counts, *[0] * size][:size]
        x, weights = [torch.randn(n, D).bfloat16().relu() for n in T], [torch.rand(n, k) for n in T]
        slots, live = [torch.rand(n, size * here).topk(k).indices for n in T], torch.randint(0, 2, (size, R)) * 7

        def dispatch(r: Any, x: Any = x, w: Any = weights, s: Any = slots, live: Tensor = live) -> Any:
            return cuda.dispatch(live[r.rank], x[r.rank], w[r.rank], s[r.rank], r, here=here, shared=shared, many=many)

        for rank, gathered in enumerate(of_host.run(dispatch)):
            want = expected(rank, live, x, weights, slots, here=here, shared=shared)
            assert all(torch.equal(a, b) for a, b in zip(gathered, want, strict=True))


@pytest.mark.parametrize(
    ("size", "D", "k", "wide", "ways", "blocks", "many"),
    [
        (2, 1032, 4, True, 2, 16, False),
        (2, 264, 0, False, 1, 16, False),
        (3, 264, 2, False, 2, 2, False),
        (2, 264, 3, True, 1, 16, False),
        (2, 2560, 3, False, 1, 1, True),
        (2, 264, 0, False, 1, 1, True),
        (3, 1032, 2, True, 1, 1, True),
        *(pytest.param(n, 264, 4, n == 8, n // 2, 16, many, marks=REST) for n in MORE for many in (False, True)),
    ],
)
def test_what_the_ranks_give_comes_back(
    size: int, D: int, k: int, wide: bool, ways: int, blocks: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_host, R = Ranks(size, blocks), 3
    together = min(R * cuda.chunks_of(D), blocks) * cuda.threads_of(D)
    monkeypatch.setattr(cuda, "AT_ONCE", together * ways)
    live = torch.ones(R, dtype=torch.int64)
    for turn, counts in enumerate(TOKENS):
        T = [*counts, *[0] * size][:size]
        own = [torch.randn(n, D) for n in T] if turn else None
        residual = [torch.randn(n, D + 8).bfloat16().relu()[..., :D] for n in T]
        parts = torch.randn(size, size * R * max(k, 1), D).to(torch.float32 if wide else torch.bfloat16)
        weights = torch.rand(size, size * R, k) * torch.randint(0, 2, (size, size * R, k)) if k else None
        if weights is not None:
            parts[weights.view(size, -1) == 0] = torch.nan  # left out, so it may be anything

        def combine(r: Any, x: Any = residual, p: Tensor = parts, w: Any = weights, own: Any = own) -> Tensor:
            of_all = {"weights_Ak": w, "own_TD": own}
            options = {name: None if given is None else given[r.rank] for name, given in of_all.items()}
            return cuda.combine(live, x[r.rank], p[r.rank], r, many=many, **options)

        given = parts.float().view(size, size, R, max(k, 1), D)  # by, to
        if weights is not None:
            given = torch.nan_to_num(given) * weights.view(size, size, R, k, 1)
        sums = given.sum(3).bfloat16().float().sum(0)
        for rank, y in enumerate(of_host.run(combine)):
            want = residual[rank].float() + sums[rank, : T[rank]] + (0.0 if own is None else own[rank])
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


@pytest.mark.parametrize("ranks", [2, 8])
def test_those_of_many_rows_compile_for_hopper(ranks: int, tmp_path: Path) -> None:
    many = {**cuda.MANY, "BLOCK": 512}
    dispatch = {"D": 2304, "K": 8, "SHARED": 1, "HERE": 128, **many}
    combine = {"D": 2304, "PARTS": 9, "WEIGHTED": 1, "WIDE": 0, "OWN": 0, **many}
    for source, macros in ((cuda.DISPATCH_MANY, dispatch), (cuda.COMBINE_MANY, combine)):
        assert compile_cuda(source, tmp_path, RANKS=ranks, RANK=1, **macros).spilled_bytes == 0
