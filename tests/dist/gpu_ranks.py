"""One of two ranks on CUDA devices: `python -m tests.dist.gpu_ranks RANK FILE CHECK` runs a check and exits with 0, or
says what was wrong."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.all_gather import cuda as gather
from thalweg.ops.all_reduce import areas_of, cuda, reference
from thalweg.ops.embedding import cuda as embedding
from thalweg.ops.linear import cuda as linear
from thalweg.ops.moe.exchange import areas_of as exchange_areas
from thalweg.ops.moe.exchange import cuda as exchange
from thalweg.ops.moe.exchange import reference as exchange_reference
from thalweg.ops.norm import NextNorm
from thalweg.ops.norm.reference import rms_norm
from thalweg.parallel.data_ranks import join_data_ranks
from thalweg.parallel.mesh import Mesh, join_mesh
from thalweg.parallel.peers import map_data_peers, map_peers

D = 2304


class Ranks:
    def __init__(self, rank: int, file: str) -> None:
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.rank, self.file, self.mesh = rank, file, join_mesh(rank, 2, file, self.device, timeout_s=60)
        map_peers(self.mesh, self.device, areas_of(2))
        assert self.mesh.peers is not None, "the ranks map no memory"
        self.own = torch.Generator(self.device).manual_seed(rank)
        self.same = torch.Generator(self.device).manual_seed(9)

    def draw(self, *shape: int, same: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.same if same else self.own).bfloat16()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rank 0's and rank 1's."""
        first, second = self.mesh.all_gather_last(x.reshape(1, -1)).view(2, -1)
        return first.view(x.shape), second.view(x.shape)

    def same_bits(self, x: Tensor) -> bool:
        return torch.equal(*self.both(x))


def sums(r: Ranks) -> None:
    for T in (0, 1, 2, 7, 33, 128, 290, 512):
        for width in (D, 7168, 264):
            if cuda.most_tokens(width, 2) < T:
                continue
            residual, x = r.draw(T, width + 8, same=True)[:, :width], r.draw(T, width)
            y = cuda.all_reduce_add(residual, x, r.mesh)
            first, second = r.both(x) if T else (x, x)
            want = (first.float() + second.float() + residual.float()).bfloat16()
            assert torch.equal(y, want), (T, width)


def many(r: Ranks) -> None:
    for T in (1, 513, 1000, 4096, 4800, 16000):
        residual, x = r.draw(T, D + 8, same=True)[:, :D], r.draw(T, D)
        for _ in range(3):
            y = cuda.all_reduce_add_many(residual, x, r.mesh)
        first, second = r.both(x)
        assert torch.equal(y, (first.float() + second.float() + residual.float()).bfloat16()), T


def many_normed(r: Ranks) -> None:
    """With the norm that comes next, by turns with sums without one."""
    weight = r.draw(D, same=True)
    for T in (1, 513, 1000, 4800, 16000):
        residual, x = r.draw(T, D, same=True), r.draw(T, D)
        for _ in range(3):
            next_norm = NextNorm(weight, 1e-5)
            y = cuda.all_reduce_add_many(residual, x, r.mesh, next_norm=next_norm)
            plain = cuda.all_reduce_add_many(residual, x, r.mesh)
        assert torch.equal(y, plain), T
        assert next_norm.normed_TD is not None
        assert r.same_bits(next_norm.normed_TD), T
        torch.testing.assert_close(next_norm.normed_TD, rms_norm(y, weight, 1e-5), atol=0, rtol=0.01)


def many_embedded(r: Ranks) -> None:
    """Rows of the vocabulary for many tokens, by turns with sums, where one rank has all rows too."""
    w, V = r.draw(1000, D), 1000
    both = torch.cat(r.both(w))
    for T in (1, 513, 4096, 16000):
        residual, x = r.draw(T, D, same=True), r.draw(T, D)
        for low, high in ((0, 2 * V), (0, V), (V, 2 * V)):
            ids = torch.randint(low, high, (T,), device=r.device, generator=r.same)
            for _ in range(3):
                rows = embedding.embedding_many(ids, w, r.mesh)
            assert torch.equal(rows, both[ids]), (T, low)
            assert r.same_bits(rows), (T, low)
            y = cuda.all_reduce_add_many(residual, x, r.mesh)
        first, second = r.both(x)
        assert torch.equal(y, (first.float() + second.float() + residual.float()).bfloat16()), T


def weighted_many(r: Ranks) -> None:
    """A token's rows of experts within the sum, in two launches too, by turns with sums of rows as they are."""
    for T in (513, 1000, 4800):
        for own in (None, torch.bfloat16, torch.float32):
            parts, residual = r.draw(T * 9, D), r.draw(T, D, same=True)
            options = {
                "weights_Tk": torch.rand(T, 9, device=r.device, generator=r.same),
                "own_TD": None if own is None else r.draw(T, D).to(own),
                "scale": 1.0 if own is None else 2.5,
            }
            y = cuda.all_reduce_add_many(residual, parts, r.mesh, **options)
            z = cuda.all_reduce_add_many(residual, cuda.of_rank(residual, parts, *options.values()), r.mesh)
            assert r.same_bits(y)
            for other in (z, cuda.all_reduce_add_separate(residual, parts, r.mesh, **options)):
                assert ((y.float() - other.float()).norm() / other.float().norm()) < 0.004, (T, own)


def weighted_sums(r: Ranks) -> None:
    for T in (1, 3, 128):
        for dtype in (torch.float32, torch.bfloat16):
            for own in (None, torch.float32, torch.bfloat16):
                parts, residual = r.draw(T * 9, D).to(dtype), r.draw(T, D, same=True)
                options = {
                    "weights_Tk": torch.rand(T, 9, device=r.device, generator=r.same),
                    "own_TD": None if own is None else r.draw(T, D).to(own),
                    "scale": 1.0 if own is None else 2.5,
                }
                y = cuda.all_reduce_add(residual, parts, r.mesh, **options)
                want = reference.all_reduce_add(residual, parts, r.mesh, **options)
                assert r.same_bits(y)
                assert ((y.float() - want.float()).norm() / want.float().norm()) < 0.005, (T, dtype, own)


def projections(r: Ranks) -> None:
    for width, rows in ((2048, D), (4608, D), (4096, 7168)):
        assert linear.reduce_refuses(width, rows, 16) is None
        for T in (0, 1, 7, 8, 9, 16):
            if T > 8 and width > 4096:
                continue
            w, x, residual = r.draw(rows, width) * 0.05, r.draw(T, width), r.draw(T, rows, same=True)
            for _ in range(3):
                y = linear.linear_reduce_add(x, w, residual, r.mesh)
            if T == 0:
                continue
            first, second = r.both(x.float() @ w.float().T)
            want = first + second + residual.float()
            assert r.same_bits(y)
            assert ((y.float() - want).norm() / want.norm()) < 0.004, (width, rows, T)


def projections_of_more_tokens(r: Ranks) -> None:
    from thalweg.ops.linear import matrix

    for width, rows in ((2048, D), (1024, D), (4608, D)):
        assert matrix.reduce_refuses(rows, 128) is None
        for T in (0, 1, 17, 33, 64, 100, 128):
            w, x, residual = r.draw(rows, width) * 0.05, r.draw(T, width), r.draw(T, rows, same=True)
            for _ in range(3):
                y = matrix.linear_reduce_add(x, w, residual, r.mesh)
            if T == 0:
                continue
            first, second = r.both(x.float() @ w.float().T)
            want = first + second + residual.float()
            assert r.same_bits(y)
            assert ((y.float() - want).norm() / want.norm()) < 0.004, (width, rows, T)


def rows(r: Ranks) -> None:
    """Logits and ids side by side, and rows of a vocabulary that the ranks divide."""
    for R, N, dtype in (
        (1, 81920, torch.bfloat16),
        (25, 81920, torch.bfloat16),
        (3, 1, torch.int64),
        (128, 1, torch.int64),
    ):
        for _ in range(3):
            x = (r.draw(R, N) * 100).to(dtype)
            assert torch.equal(gather.all_gather(x, r.mesh), torch.cat(r.both(x), -1)), (R, N)
    w = r.draw(1000, D)
    for T in (1, 7, 128, 512):
        ids = torch.randint(0, 2000, (T,), device=r.device, generator=r.same)
        for _ in range(3):
            x = embedding.embedding(ids, w, r.mesh)
        assert torch.equal(x, torch.cat(r.both(w))[ids]), T


def ids(r: Ranks) -> None:
    """Of logits that the ranks have halves of, those of all of them on one, in a graph's order and again."""
    from thalweg.ops.sample.over_ranks import sample_over_ranks
    from thalweg.ops.sample.triton import sample

    for R, V in ((1, 163_840), (128, 163_840), (5, 5001)):
        part = -(-V // 2)
        logits = r.draw(R, 2 * part, same=True) * 3
        temperatures = torch.rand(R, device=r.device, generator=r.same) + 0.1
        temperatures[::3] = 0
        seeds, slots = (
            torch.arange(R, device=r.device) * 1_000_003,
            torch.randperm(R, device=r.device, generator=r.same),
        )
        if R > 3:
            logits[3, V - 1] = torch.nan
        for step in range(5):
            given = (temperatures, seeds, torch.arange(R, device=r.device) + step, slots)
            mine = logits[:, part * r.rank : part * (r.rank + 1)]
            found = sample_over_ranks(mine, *given, r.mesh, vocab=V)
            assert torch.equal(found, sample(logits[:, :V], *given, check=True)), (R, V)


def replays(r: Ranks) -> None:
    """Thousands of a graph in which every sum is of what the one before gave, while ranks are late in turn."""
    from thalweg.ops.linear import matrix

    w = r.draw(D, D) * 0.02
    for T in (1, 16, 24, 100, 600):
        x, residual = r.draw(T, D), r.draw(T, D, same=True)
        digest = torch.zeros(T, D, device=r.device)

        def step(T: int = T, x: Tensor = x, residual: Tensor = residual, digest: Tensor = digest) -> None:
            y = (cuda.all_reduce_add if T <= 512 else cuda.all_reduce_add_many)(residual, x, r.mesh)
            if T > 128:
                z = cuda.all_reduce_add_many(residual, y @ w.T, r.mesh)
            else:
                z = (linear if T <= 16 else matrix).linear_reduce_add(y, w, residual, r.mesh)
            x.copy_((z * 0.5 + 0.25 * (r.rank + 1)).clamp(-4, 4))
            digest.mul_(0.9).add_(z)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(5):
                step()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        for i in range(2000):
            if i % 97 == 40 * r.rank:
                torch.cuda._sleep(1_000_000)
            graph.replay()
        torch.cuda.synchronize()
        assert digest.isfinite().all()
        assert r.same_bits(digest)


def the_same_from_run_to_run(r: Ranks) -> None:
    x, residual = r.draw(64, D), r.draw(64, D, same=True)
    first = cuda.all_reduce_add(residual, x, r.mesh)
    assert all(torch.equal(cuda.all_reduce_add(residual, x, r.mesh), first) for _ in range(200))


def tokens_to_experts_and_back(r: Ranks) -> None:
    """Of data-parallel ranks, in the forms for few rows and for many, against the collectives; a graph of them many
    times, while ranks are late in turn."""
    ranks = join_data_ranks(r.rank, 2, f"{r.file}-data", r.device, timeout_s=60)
    map_data_peers(ranks, r.device, exchange_areas(2))
    here, shared, K = 64, 1, 8
    for R, width in ((1, D), (7, 7168), (64, D), (256, D), (1000, D)):
        T = R if r.rank or R != 64 else 40
        x, residual = r.draw(T, width), r.draw(T, width + 8)[:, :width]
        weights = torch.rand(T, K + shared, device=r.device, generator=r.own)
        slots = torch.rand(T, 2 * here, device=r.device, generator=r.own).topk(K + shared).indices
        live = torch.randint(0, 3, (R,), device=r.device, generator=r.own)
        parts, own = r.draw(2 * R * (K + shared), width).float(), r.draw(T, width).float()

        def step(x: Tensor = x, weights: Tensor = weights, slots: Tensor = slots, live: Tensor = live,
                 residual: Tensor = residual, parts: Tensor = parts, own: Tensor = own,
                 form: Any = exchange, **options: bool) -> tuple[Tensor, ...]:  # fmt: skip
            gathered = form.dispatch(live, x, weights, slots, ranks, here=here, shared=shared, **options)
            given, options = (live, residual, parts, ranks), {"weights_Ak": gathered.weights_Ak, **options}
            return *gathered, form.combine(*given, **options), form.combine(*given, own_TD=own, **options)

        want = step(form=exchange_reference)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _ = step(many=False), step(many=True)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            results = [step(many=many) for many in (False, True, True, False)]
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        for i in range(200):
            if i % 37 == 18 * r.rank:
                torch.cuda._sleep(1_000_000)
            graph.replay()
        for found in results:
            for a, b in zip(found[:3], want[:3], strict=True):
                assert torch.equal(a, b), (R, width)
            for a, b in zip(found[3:], want[3:], strict=True):
                assert ((a.float() - b.float()).norm() / b.float().norm()) < 0.005, (R, width)
    torch.cuda.synchronize()
    ranks.close()


def a_rank_that_dies(r: Ranks) -> None:
    """Rank 1 ends while rank 0 waits in a kernel for it, which then ends too."""
    r.both(r.draw(8))
    torch.cuda.synchronize()
    if r.rank == 1:
        time.sleep(0.5)
        os._exit(0)
    x = r.draw(8, D)
    began = time.monotonic()
    cuda.all_reduce_add(x, x, r.mesh)
    torch.cuda.synchronize()
    assert 0.5 < time.monotonic() - began < 8


def _run(rank: int, file: str, check: Callable[[Ranks], None]) -> None:
    ranks = Ranks(rank, file)
    with torch.inference_mode():
        check(ranks)
    if check is not a_rank_that_dies:
        torch.cuda.synchronize()
        mesh: Mesh = ranks.mesh
        mesh.close()
    sys.stdout.flush()
    os._exit(0)  # while `ranks` is there: a group that is let go, not left, waits for a rank that died


CHECKS = [
    *(sums, many, many_normed, many_embedded, weighted_sums, weighted_many, projections, projections_of_more_tokens),
    *(rows, ids, replays, the_same_from_run_to_run, tokens_to_experts_and_back, a_rank_that_dies),
]

if __name__ == "__main__":
    _run(int(sys.argv[1]), sys.argv[2], next(c for c in CHECKS if c.__name__ == sys.argv[3]))
