"""What ranks exchange by writing to each other's memory, in CUDA C++: kernels of several ranks run on the host, side by
side, and compiled for Hopper; results of devices are in tests/dist/test_gpu_all_reduce.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.compile_cuda import compile_cuda
from tests.ops.run_on_host import HostKernel, host_tensor_map
from thalweg.ops.all_gather import cuda as gather
from thalweg.ops.all_reduce import AREAS, cuda, reference
from thalweg.ops.embedding import cuda as embedding
from thalweg.ops.linear import cuda as linear
from thalweg.ops.norm import NextNorm
from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.sample import over_ranks
from thalweg.parallel.peers import KINDS, Area

REST = pytest.mark.exhaustive  # of a matrix, each of which compiles the kernels of its ranks
MORE = (4, 8)  # ranks, which no GPUs have shown


class HostRanks:
    """Ranks whose memory is this process's, and which run as its threads."""

    def __init__(self, size: int, of_many: tuple[int, int] = (1, 0), blocks: int = 16) -> None:
        self.size = size
        areas_of_rank = [*((blocks, place_bytes) for _, place_bytes in AREAS[:2]), of_many]
        self.memory = [
            [torch.zeros(KINDS * size * n * b, dtype=torch.uint8) for n, b in areas_of_rank] for _ in range(size)
        ]
        self.stop = torch.zeros(1, dtype=torch.int32)
        self.counts = [[torch.zeros(n, dtype=torch.int32) for n, _ in areas_of_rank] for _ in range(size)]
        self.ranks = []
        for rank in range(size):
            areas = []
            for i, (n, place_bytes) in enumerate(areas_of_rank):
                addresses = [self.memory[r][i].data_ptr() for r in range(size)]
                table = [*addresses, self.counts[rank][i].data_ptr(), self.stop.data_ptr()]
                areas.append(Area(torch.tensor(table), n, place_bytes))
            self.ranks.append(SimpleNamespace(tp_rank=rank, tp_size=size, peers=SimpleNamespace(areas=areas)))

    def run(self, body: Callable[[Any], Tensor]) -> list[Tensor]:
        results: dict[int, Tensor] = {}

        def one(rank: int) -> None:
            results[rank] = body(self.ranks[rank])

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(results) == self.size, "a rank hangs"
        return [results[rank] for rank in range(self.size)]


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cuda, gather, embedding, linear):
        monkeypatch.setattr(module, "cuda_kernel", HostKernel)


def same(results: list[Tensor]) -> Tensor:
    assert all(torch.equal(y, results[0]) for y in results)
    return results[0]


@pytest.mark.parametrize(
    ("size", "D"), [(2, 264), *(pytest.param(*each, marks=REST) for each in ((3, 1032), (4, 264), (8, 264)))]
)
def test_sums_one_after_another(size: int, D: int) -> None:
    ranks = HostRanks(size)
    for T in (1, 3, 2, 3, 0, 1, 1):
        x, residual = torch.randn(size, T, D + 8).bfloat16()[..., :D], torch.randn(T, D + 16).bfloat16()[:, :D]
        y = same(ranks.run(lambda r, x=x, residual=residual: cuda.all_reduce_add(residual, x[r.tp_rank], r)))
        assert torch.equal(y, (x.float().sum(0) + residual.float()).bfloat16())


def few_threads(monkeypatch: pytest.MonkeyPatch) -> HostRanks:
    """Ranks whose sums of many tokens have more than one launch, and more than two batches."""
    monkeypatch.setattr(cuda, "MANY_THREADS", 32)
    monkeypatch.setattr(cuda, "AREAS", (*AREAS[:2], (3, 2560)))
    return HostRanks(2, (3, 2560))


def test_sums_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = few_threads(monkeypatch)
    for T in (60, 1, 12, 3, 0):
        x, residual = torch.randn(2, T, 264).relu().bfloat16(), torch.randn(T, 272).bfloat16()[:, :264]
        x[0, :, 7], x[1, ::3], residual[::2, 5] = 0.0, 0.0, -0.0
        y = same(ranks.run(lambda r, x=x, residual=residual: cuda.all_reduce_add_many(residual, x[r.tp_rank], r)))
        assert torch.equal(y, (x.float().sum(0) + residual.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=REST)])
def test_sums_of_many_tokens_with_the_next_norm(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    ranks, D = few_threads(monkeypatch), 512
    weight = torch.randn(D).to(dtype)
    for T in (60, 1, 12, 3, 0):
        x, residual = torch.randn(2, T, D).bfloat16(), torch.randn(T, D).bfloat16()
        norms = [NextNorm(weight, 1e-5) for _ in range(2)]
        y = same(
            ranks.run(
                lambda r, x=x, residual=residual, norms=norms: cuda.all_reduce_add_many(
                    residual, x[r.tp_rank], r, next_norm=norms[r.tp_rank]
                )
            )
        )
        assert torch.equal(y, (x.float().sum(0) + residual.float()).bfloat16())
        normed = same([norm.normed_TD for norm in norms])
        torch.testing.assert_close(normed, rms_norm(y, weight, 1e-5), atol=0, rtol=0.01)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=REST)])
def test_weighted_sums_of_many_tokens(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    ranks, k = few_threads(monkeypatch), 3
    for T in (40, 1):
        parts, residual = torch.randn(2, T * k, 264).bfloat16(), torch.randn(T, 264).bfloat16()
        weights, owns = torch.rand(T, k), torch.randn(2, T, 264).bfloat16()
        options = [
            {"weights_Tk": weights, "own_TD": owns[r] if own else None, "scale": 2.5 if own else 1.0} for r in (0, 1)
        ]
        y = same(
            ranks.run(
                lambda r, parts=parts, residual=residual, options=options: cuda.all_reduce_add_many(
                    residual, parts[r.tp_rank], r, **options[r.tp_rank]
                )
            )
        )
        given = [reference.of_rank(residual, parts[r], **options[r]).float() for r in range(2)]
        torch.testing.assert_close(y.float(), given[0] + given[1] + residual.float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("size", "dtype", "own"),
    [
        (2, torch.float32, torch.float32),
        *(
            pytest.param(2, dtype, own, marks=REST)
            for dtype in (torch.float32, torch.bfloat16)
            for own in (None, torch.bfloat16)
        ),
        *(pytest.param(size, torch.bfloat16, torch.bfloat16, marks=REST) for size in MORE),
    ],
)
def test_weighted_sums(size: int, dtype: torch.dtype, own: torch.dtype | None) -> None:
    T, k, D = 2, 3, 264
    parts, residual, weights = torch.randn(size, T * k, D).to(dtype), torch.randn(T, D).bfloat16(), torch.rand(T, k)
    owns = torch.randn(size, T, D).to(own)

    def options(r: int) -> dict[str, Any]:
        return {"weights_Tk": weights, "own_TD": owns[r] if own else None, "scale": 2.5 if own else 1.0}

    y = same(HostRanks(size).run(lambda r: cuda.all_reduce_add(residual, parts[r.tp_rank], r, **options(r.tp_rank))))
    given = [reference.of_rank(residual, parts[r], **options(r)).float() for r in range(size)]
    torch.testing.assert_close(y.float(), torch.stack([*given, residual.float()]).sum(0), atol=0.05, rtol=0.02)


@REST
def test_of_a_whole_sum_and_an_own_expert() -> None:
    x, owns, residual = (torch.randn(n, 2, 264).bfloat16() for n in (2, 2, 1))
    y = same(
        HostRanks(2).run(lambda r: cuda.all_reduce_add(residual[0], x[r.tp_rank], r, own_TD=owns[r.tp_rank], scale=1.5))
    )
    want = (owns.float() + 1.5 * x.float()).bfloat16().float().sum(0) + residual[0].float()
    torch.testing.assert_close(y, want.bfloat16())


@pytest.mark.parametrize(
    ("size", "T", "D", "O"),
    [
        (2, 8, 992, 29),
        *(pytest.param(2, *sizes, marks=REST) for sizes in ((1, 288, 37), (9, 320, 90), (5, 4640, 12))),
        *(pytest.param(size, 9, 320, 90, marks=REST) for size in MORE),
    ],
)
def test_projections(size: int, T: int, D: int, O: int) -> None:
    ranks, residual = HostRanks(size), torch.randn(T, O + 3).bfloat16()[:, :O]
    for _ in range(3):
        x, w = torch.randn(size, T, D).bfloat16(), torch.randn(size, O, D).bfloat16()
        y = same(ranks.run(lambda r, x=x, w=w: linear.linear_reduce_add(x[r.tp_rank], w[r.tp_rank], residual, r)))
        want = sum(x[r].double() @ w[r].double().T for r in range(size)) + residual.double()
        assert ((y.double() - want).norm() / want.norm()) < 0.004


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=REST) for size in MORE)])
def test_projections_of_more_tokens(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    matrix = pytest.importorskip("thalweg.ops.linear.matrix", exc_type=ImportError)
    monkeypatch.setattr(matrix, "cuda_kernel", HostKernel)
    monkeypatch.setattr(matrix, "tensor_map", host_tensor_map)
    T, D, O = 18, 136, 232  # in four tiles, of which the last is shorter
    ranks, residual = HostRanks(size), torch.randn(T, O + 8).bfloat16()[:, :O]
    for _ in range(3):
        x, w = torch.randn(size, T, D).bfloat16(), torch.randn(size, O, D).bfloat16()
        y = same(ranks.run(lambda r, x=x, w=w: matrix.linear_reduce_add(x[r.tp_rank], w[r.tp_rank], residual, r)))
        want = sum(x[r].double() @ w[r].double().T for r in range(size)) + residual.double()
        assert ((y.double() - want).norm() / want.norm()) < 0.004


@pytest.mark.parametrize(
    ("ranks", "R", "N", "dtype"),
    [
        (2, 2, 1284, torch.bfloat16),
        *(pytest.param(3, *row, marks=REST) for row in ((3, 4, torch.bfloat16), (5, 1, torch.int64))),
        *(pytest.param(size, 3, 1284, torch.bfloat16, marks=REST) for size in MORE),
    ],
)
def test_rows_side_by_side(ranks: int, R: int, N: int, dtype: torch.dtype) -> None:
    of_host = HostRanks(ranks)
    for _ in range(3):
        x = (torch.randn(ranks, R, N) * 100).to(dtype)
        y = same(of_host.run(lambda r, x=x: gather.all_gather(x[r.tp_rank], r)))
        assert torch.equal(y, torch.cat(list(x), -1))


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=REST) for size in MORE)])
def test_rows_of_a_vocabulary(size: int) -> None:
    ranks, w, last = HostRanks(size), torch.randn(size, 30, 264).bfloat16(), 30 * size - 1
    for ids in (torch.tensor([0, last, 29, 30, 40]), torch.tensor([41]), torch.tensor([], dtype=torch.int64)):
        x = same(ranks.run(lambda r, ids=ids: embedding.embedding(ids, w[r.tp_rank], r)))
        assert torch.equal(x, w.view(-1, 264)[ids])


def test_rows_of_a_vocabulary_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, w = few_threads(monkeypatch), torch.randn(2, 30, 264).relu().bfloat16()
    monkeypatch.setattr(embedding, "MANY_THREADS", 32)
    for T in (60, 1, 12, 3, 0):
        for ids in (torch.randint(60, (T,)), torch.randint(30, (T,)), torch.randint(30, 60, (T,))):
            for _ in range(3):
                x = same(ranks.run(lambda r, ids=ids: embedding.embedding_many(ids, w[r.tp_rank], r)))
                assert torch.equal(x, w.view(-1, 264)[ids])
        residual, x = torch.randn(T, 264).bfloat16(), torch.randn(2, T, 264).bfloat16()
        y = same(ranks.run(lambda r, x=x, residual=residual: cuda.all_reduce_add_many(residual, x[r.tp_rank], r)))
        assert torch.equal(y, (x.float().sum(0) + residual.float()).bfloat16())


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=REST) for size in (3, *MORE))])
def test_ids_of_the_best_of_all_ranks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(over_ranks, "cuda_kernel", HostKernel)
    ranks, R, B = HostRanks(size), 6, 37
    for _ in range(3):
        values, ids = torch.randn(R, size * B), torch.arange(size * B, dtype=torch.int32).expand(R, -1).contiguous()
        values[0], values[1, 5], values[1, B + 2] = -torch.inf, 9.0, 9.0  # equals of one rank, and of two
        values[2, B + 4], ids[2, B + 4] = torch.inf, -1  # a logit was not finite

        def body(r: Any, values: Tensor = values, ids: Tensor = ids) -> Tensor:
            part = slice(B * r.tp_rank, B * r.tp_rank + B)
            return over_ranks.choose(values[:, part].contiguous(), ids[:, part].contiguous(), r)

        chosen = same(ranks.run(body))
        assert chosen.tolist() == ids.gather(1, values.argmax(1, keepdim=True))[:, 0].tolist()
        assert chosen[:3].tolist() == [0, 5, -1]


def test_who_waits_for_a_rank_that_is_gone_is_stopped() -> None:
    ranks = HostRanks(2)
    x = torch.zeros(1, 264).bfloat16()
    waits = threading.Thread(target=cuda.all_reduce_add, args=(x, x, ranks.ranks[0]), daemon=True)
    waits.start()
    waits.join(0.5)
    assert waits.is_alive()
    ranks.stop[0] = 1
    waits.join(30)
    assert not waits.is_alive()


@pytest.mark.parametrize(("wide", "size"), [(0, 2), (1, 2), *(pytest.param(1, size, marks=REST) for size in MORE)])
def test_sums_compile_for_hopper(wide: int, size: int, tmp_path: Path) -> None:
    macros = {"D": 2304, "PARTS": 9, "WEIGHTED": 1, "WIDE": wide, "OWN": 0, "RANKS": size, "RANK": 1}
    assert compile_cuda(cuda.SOURCE, tmp_path, BLOCK=96, **macros).spilled_bytes == 0


def test_the_others_compile_for_hopper(tmp_path: Path) -> None:
    for source, macros in ((gather.SOURCE, {}), (embedding.SOURCE, {"D": 2304}), (over_ranks.SOURCE, {})):
        assert compile_cuda(source, tmp_path, BLOCK=96, RANKS=4, RANK=1, **macros).spilled_bytes == 0
    macros = {"BLOCK": embedding.MANY_THREADS, **embedding.MANY}
    assert compile_cuda(embedding.OF_MANY, tmp_path, D=2304, RANKS=2, RANK=1, **macros).spilled_bytes == 0


@pytest.mark.parametrize("parts", [1, 9])
@pytest.mark.parametrize("norm", [0, 2, 4])
def test_sums_of_many_compile_for_hopper(parts: int, norm: int, tmp_path: Path) -> None:
    macros = {"D": 2304, "PARTS": parts, "WEIGHTED": int(parts > 1), "OWN": 0, "BLOCK": cuda.MANY_THREADS}
    macros |= {**cuda.MANY, "NORM": norm, "RANKS": 2, "RANK": 1}
    if norm:
        macros["BLOCK"] = 288
    assert compile_cuda(cuda.OF_MANY, tmp_path, **macros).spilled_bytes == 0


@pytest.mark.parametrize(("tokens", "size"), [(8, 2), (16, 2), *(pytest.param(16, size, marks=REST) for size in MORE)])
def test_projections_compile_for_hopper(tokens: int, size: int, tmp_path: Path) -> None:
    cut = linear.tiling(18, 4096 // size, tokens)
    macros = {
        "D": 4096 // size,
        "PASS": cut.columns,
        "WARPS": 8,
        "TOKENS": tokens,
        "ROWS": cut.rows,
        "NORM": 0,
        "ADD": 1,
    }
    macros["GATED"] = 0
    assert compile_cuda(linear.SOURCE, tmp_path, RANKS=size, RANK=0, **macros).spilled_bytes == 0
