"""Op "sample": its noise, its draws, the kernel under the interpreter and compiled for Hopper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.compile_sm90 import compile_sm90
from tests.ops.interpreted import run_interpreted
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.sample import SAMPLE_OVER_RANKS, SampleOverRanksDims
from thalweg.ops.sample.reference import gumbel, sample


def case(R: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(R)
    temperatures = torch.rand(R, generator=g) * 2
    temperatures[::4] = 0
    seeds = torch.randint(-(2**62), 2**62, (R,), generator=g)
    return torch.randn(R, V, generator=g) * 3, temperatures, seeds, torch.randint(0, 9999, (R,), generator=g)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(torch.arange(50), torch.arange(50), 20_000)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(1.6449, abs=0.02)  # pi squared / 6
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.05


def test_draws_follow_the_softmax() -> None:
    logits, n = torch.tensor([0.0, 1.0, 2.0, -torch.inf]), 40_000
    ids = sample(logits.expand(n, 4), torch.full((n,), 0.7), torch.full((n,), 5), torch.arange(n))
    shares = ids.bincount(minlength=4) / n
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), rtol=0, atol=0.01)
    assert shares[3] == 0


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    rows = case(9, 500)
    together = sample(*rows)
    alone = torch.cat([sample(*(t[i : i + 1] for t in rows)) for i in range(9)])
    assert together.tolist() == alone.tolist()
    assert together[::4].tolist() == rows[0][::4].argmax(-1).tolist()


def odd_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NaN everywhere, -inf everywhere, NaN in half, one +inf, a tie at temperature 0."""
    logits, temperatures, seeds, positions = case(5, 300)
    logits[0], logits[1], logits[2, :150], logits[3, 7], logits[4, [20, 90]] = (
        torch.nan,
        -torch.inf,
        torch.nan,
        torch.inf,
        99.0,
    )
    temperatures[:4], temperatures[4] = 1, 0
    return logits, temperatures, seeds, positions


def test_odd_rows() -> None:
    ids = sample(*odd_rows()).tolist()
    assert ids[:2] == [0, 0]
    assert ids[2] >= 150
    assert ids[3:] == [7, 20]


def test_checked_rows_by_slot() -> None:
    logits, temperatures, seeds, positions = odd_rows()
    slots = torch.tensor([3, 1, 0, 2, 4])
    ids = sample(logits, temperatures[slots], seeds[slots], positions, check=True)
    assert ids.tolist() == sample(logits, temperatures, seeds, positions, slots, check=True).tolist()
    assert ids.tolist() == [-1, -1, -1, -1, 20]


def check_kernel() -> None:
    from thalweg.ops.sample.triton import sample as kernel

    for rows in (case(1, 100), case(13, 5000), odd_rows()):
        assert kernel(*rows).tolist() == sample(*rows).tolist()
        in_bf16 = (rows[0].bfloat16(), *rows[1:])
        assert kernel(*in_bf16).tolist() == sample(*in_bf16).tolist()
        slots = torch.arange(len(rows[0])).flip(0)
        assert kernel(*rows, slots, check=True).tolist() == sample(*rows, slots, check=True).tolist()


def check_parts() -> None:
    """Blocks of a part have the best of those of the whole, with their ids."""
    from thalweg.ops.sample.triton import best_of_blocks

    logits, temperatures, seeds, positions = case(5, 9000)
    of_slots = (temperatures, seeds, positions, torch.arange(5).flip(0))
    values, ids = best_of_blocks(logits, *of_slots, check=True)
    parts = [best_of_blocks(logits[:, at : at + 4096], *of_slots, check=True, first=at) for at in (0, 4096, 8192)]
    assert torch.cat([v for v, _ in parts], 1).tolist() == values.tolist()
    assert torch.cat([i for _, i in parts], 1).tolist() == ids.tolist()


def test_kernel_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kernel, check_parts)


def test_ranks_that_divide_a_vocabulary_choose_as_one() -> None:
    logits, temperatures, seeds, positions = case(9, 501)
    given = (temperatures, seeds, positions, torch.arange(9))
    want = sample(logits, *given, check=True)
    padded = torch.cat([logits, torch.full((9, 1), 1e9)], 1)
    for rank in range(2):
        ranks: Any = SimpleNamespace(tp_rank=rank, tp_size=2, all_gather_last=lambda _: padded)
        dims = SampleOverRanksDims(V=501, ranks=2, mapped=False)
        op = Resolver().resolve(SAMPLE_OVER_RANKS, Where("cpu", "float32"), dims)
        assert op(padded[:, 251 * rank : 251 * rank + 251], *given, ranks).tolist() == want.tolist()


def test_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.sample.triton import best_of_blocks_kernel, best_of_rows_kernel

    types = {"logits_ptr": "*bf16", "temperatures_ptr": "*fp32", "seeds_ptr": "*i64", "positions_ptr": "*i64"}
    types |= {
        "values_ptr": "*fp32",
        "ids_ptr": "*i32",
        "V": "i32",
        "first": "i32",
        "logits_stride": "i32",
        "slots_ptr": "*i64",
    }
    constants = dict(BLOCK_V=2048, BY_SLOT=True, CHECK=True, PDL=True)
    assert compile_sm90(best_of_blocks_kernel, types, constants).spilled_bytes == 0
    types = {"values_ptr": "*fp32", "ids_ptr": "*i32", "out_ptr": "*i64", "blocks": "i32"}
    assert compile_sm90(best_of_rows_kernel, types, dict(BLOCKS=128, PDL=True), num_warps=1).spilled_bytes == 0
