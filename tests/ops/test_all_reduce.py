"""Op "all_reduce_add" and what ends in it, over ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg import ops as _ops  # noqa: F401 -- registers every op's implementations
from thalweg.ops.all_reduce import ALL_REDUCE_ADD, AREAS, ROWS, AllReduceAddDims, cuda, reference
from thalweg.ops.linear import LINEAR_REDUCE_ADD, LinearReduceDims
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims
from thalweg.ops.registry import Resolver, Where

CPU = Where("cpu", "float32")


class Threads:
    """Ranks that sum by waiting for one another."""

    def __init__(self, size: int) -> None:
        self.size, self._meeting, self._given = size, threading.Barrier(size, timeout=20), dict[int, Tensor]()

    def rank(self, rank: int) -> Any:
        def all_reduce(x: Tensor) -> Tensor:
            self._given[rank] = x.clone()
            self._meeting.wait()
            total = torch.stack([self._given[r] for r in range(self.size)]).sum(0)
            self._meeting.wait()
            return x.copy_(total)

        return SimpleNamespace(tp_rank=rank, tp_size=self.size, peers=None, all_reduce=all_reduce)

    def run(self, body: Callable[[Any], Tensor]) -> list[Tensor]:
        results: dict[int, Tensor] = {}

        def one(rank: int) -> None:
            results[rank] = body(self.rank(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [results[rank] for rank in range(self.size)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_and_the_residual(ranks: int) -> None:
    x, residual = torch.randn(ranks, 5, 24), torch.randn(5, 24)
    for y in Threads(ranks).run(lambda r: reference.all_reduce_add(residual, x[r.tp_rank].clone(), r)):
        torch.testing.assert_close(y, (residual.double() + x.double().sum(0)).float())


@pytest.mark.parametrize("own", [False, True])
def test_weighted_parts_of_pairs(own: bool) -> None:
    parts, weights, residual = torch.randn(2, 5 * 3, 24), torch.rand(5, 3), torch.randn(5, 24)
    owns = torch.randn(2, 5, 24)

    def body(r: Any) -> Tensor:
        more = {"own_TD": owns[r.tp_rank], "scale": 2.5} if own else {}
        return reference.all_reduce_add(residual, parts[r.tp_rank], r, weights_Tk=weights, **more)

    want = (parts.double().view(2, 5, 3, 24) * weights.double().unsqueeze(-1)).sum(2)
    want = (owns.double() + 2.5 * want).sum(0) if own else want.sum(0)
    for y in Threads(2).run(body):
        torch.testing.assert_close(y, (residual + want).float())


@pytest.mark.parametrize("name", ["reference", "separate"])
def test_a_projection_shared_by_ranks_is_that_of_one(name: str) -> None:
    x, w, residual = torch.randn(5, 16), torch.randn(24, 16), torch.randn(5, 24)
    dims = LinearReduceDims(D=8, O=24, ranks=2, mapped=False)

    def body(r: Any) -> Tensor:
        op = Resolver({LINEAR_REDUCE_ADD.name: name}).resolve(LINEAR_REDUCE_ADD, CPU, dims)
        share = slice(8 * r.tp_rank, 8 * r.tp_rank + 8)
        return op(x[:, share], w[:, share].contiguous(), residual, r)

    for y in Threads(2).run(body):
        torch.testing.assert_close(y, residual + x @ w.T)


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_experts_leave_their_end_to_finish(name: str) -> None:
    dims, generator = ExpertsDims(E=6, D=16, I=8), torch.Generator().manual_seed(0)
    x, ids = torch.randn(4, 16), torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(4)])
    weights, gate_up, down = torch.rand(4, 3), torch.randn(6, 16, 16), torch.randn(6, 16, 8)
    try:
        op = Resolver({EXPERTS.name: name}).resolve(EXPERTS, CPU, dims)
    except Exception as e:  # noqa: BLE001 -- no compiler here
        pytest.skip(str(e))
    want = op(x, weights, ids, (gate_up,), (down,))

    def finish(parts: Tensor, *, weights_Tk: Tensor | None = None, **_: Any) -> Tensor:
        assert weights_Tk is None
        return -parts

    torch.testing.assert_close(op(x, weights, ids, (gate_up,), (down,), finish=finish), -want)


@pytest.mark.parametrize(("D", "ranks"), [(2304, 2), (7168, 2), (2048, 2), (264, 2), (7168, 8), (2304, 8)])
def test_a_block_meets_its_peer_in_a_place_of_its_own(D: int, ranks: int) -> None:
    blocks, place_bytes = AREAS[ROWS]
    assert cuda.most_tokens(D, ranks) >= 64
    assert cuda.most_tokens(D, ranks) * cuda.chunks_of(D) <= blocks
    assert 32 * cuda.threads_of(D) <= place_bytes
    assert cuda.chunks_of(D) * cuda.threads_of(D) * cuda.EACH >= D


@pytest.mark.parametrize(
    ("dims", "where", "reason"),
    [
        ({"mapped": False}, Where("cuda", "bfloat16"), "map each other's memory"),
        ({}, Where("cuda", "float32"), "needs bfloat16"),
        ({"D": 12}, Where("cuda", "bfloat16"), "multiple of 8"),
        ({}, Where("cpu", "bfloat16"), "needs cuda"),
    ],
)
def test_refusals(dims: dict[str, Any], where: Where, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(ALL_REDUCE_ADD, where, AllReduceAddDims(**{"D": 64, "ranks": 2, "mapped": True, **dims}))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]
