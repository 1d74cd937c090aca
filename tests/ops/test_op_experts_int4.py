"""Scheme "int4": known words, and op "experts" over them against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.moe_case import moe_case_int4
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims
from thalweg.ops.registry import Resolver, Where
from thalweg.quant import INT4_EXPERTS, QUANTIZATIONS


def test_known_words() -> None:
    """The first element in the lowest bits, each as its value + 8; a scale for 32 columns of a row."""
    words = torch.tensor([[0x76543210, -1, 0x08, 0x0], [0x88888888 - 2**32, 0x0F, 0, 0], [0] * 4]).int()
    words = torch.cat([words, words.flip(0)], -1)[:, :5]  # 40 columns: a whole group and a part of one
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0], [0.25, 1.0]])
    wide = INT4_EXPERTS.widened([words, scales], 1, torch.float32)
    assert wide.shape == (3, 40)
    assert wide[0, :8].tolist() == [0.5 * v for v in range(-8, 0)]
    assert wide[0, 8:16].tolist() == [3.5] * 8
    assert wide[0, 16:24].tolist() == [0.0, *[-4.0] * 7]
    assert wide[1, :9].tolist() == [*[0.0] * 8, 7.0]
    assert wide[0, 32:].tolist() == [-16.0] * 8
    assert wide[1, 32:].tolist() == [0.0] * 8
    assert INT4_EXPERTS.name not in QUANTIZATIONS  # nothing quantizes to it as it is loaded


@pytest.mark.parametrize("T", [1, 3, 40])
def test_experts_against_float64(T: int) -> None:
    E, D, I, k = 5, 64, 40, 2
    rng = torch.Generator().manual_seed(T)

    def drawn(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.randint(-(2**31), 2**31, (E, rows, columns // 8), generator=rng).int()
        return words, torch.rand(E, rows, -(-columns // 32), generator=rng).mul(0.02).bfloat16().float()

    gate_up, down = drawn(2 * I, D), drawn(D, I)
    x, residual = torch.randn(T, D, generator=rng), torch.randn(T, D, generator=rng)
    weights = torch.rand(T, k, generator=rng)
    ids = torch.stack([torch.randperm(E, generator=rng)[:k] for _ in range(T)])
    experts = Resolver().resolve(EXPERTS, Where("cpu", "float32"), ExpertsDims(E=E, D=D, I=I, scheme="int4"))
    got = experts(x, weights, ids, gate_up, down, residual_TD=residual)

    def element(stored: tuple[torch.Tensor, torch.Tensor], e: int, row: int, column: int) -> float:
        word = int(stored[0][e, row, column // 8]) & 0xFFFFFFFF
        return ((word >> 4 * (column % 8) & 15) - 8) * float(stored[1][e, row, column // 32])

    def matrix(stored: tuple[torch.Tensor, torch.Tensor], e: int, rows: int, columns: int) -> torch.Tensor:
        values = [[element(stored, e, r, c) for c in range(columns)] for r in range(rows)]
        return torch.tensor(values, dtype=torch.float64)

    of_experts = [(matrix(gate_up, e, 2 * I, D), matrix(down, e, D, I)) for e in range(E)]
    for t in range(T):
        truth = residual[t].double()
        for j in range(k):
            w_gate_up, w_down = of_experts[int(ids[t, j])]
            gate, up = (w_gate_up @ x[t].double()).chunk(2)
            truth = truth + float(weights[t, j]) * (w_down @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(got[t].double(), truth, rtol=1e-5, atol=1e-5)


def test_an_own_expert_is_added_as_the_parts_by_themselves() -> None:
    case = moe_case_int4(5, 64, 40, 6, 2, torch.bfloat16, own=24, scale=2.5)
    where, dims = Where("cpu", "bfloat16"), case.dims
    own = replace(case, scale=0.0).run(Resolver().resolve(EXPERTS, where, dims))
    routed = replace(case, own=None).run(Resolver().resolve(EXPERTS, where, replace(dims, own=0)))
    expected = case.residual + (own.float() + 2.5 * routed.float()).bfloat16()
    for prefer in ({}, {"experts": "separate"}):
        y = case.run(Resolver(prefer).resolve(EXPERTS, where, dims), residual_TD=case.residual)
        assert torch.equal(y, expected)
    without = case.run(Resolver({"experts": "separate"}).resolve(EXPERTS, where, dims))
    assert torch.equal(without, (own.float() + 2.5 * routed.float()).bfloat16())


def test_kernels_without_a_loader_for_it_refuse_by_name() -> None:
    resolver = Resolver()
    resolver.resolve(EXPERTS, Where("cuda", "bfloat16"), ExpertsDims(E=384, D=7168, I=2048, scheme="fp8 | int4"))
    resolver.resolve(EXPERTS, Where("cuda", "bfloat16"), ExpertsDims(E=384, D=7168, I=2048, scheme="int4"))
    two, int4 = (dict(choice.refused) for choice in resolver.explain())
    assert two["grouped"] == "needs weights in scheme none or fp8 or int4, not fp8 | int4"
    assert int4["pairs"] == "has no loader for weights in scheme int4"
