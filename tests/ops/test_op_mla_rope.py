"""Ops "mla_rope" and "mla_decode": references against complex numbers and dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from thalweg.ops.attention.mla import MLA_DECODE, MlaDecodeDims
from thalweg.ops.attention.mla_rope import MLA_ROPE, MlaRopeDims
from thalweg.ops.registry import Resolver, Where

CPU = Where("cpu", "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_turn_as_complex_numbers_in_place(dtype: torch.dtype) -> None:
    T, H, K, P = 5, 3, 6, 8
    rng = torch.Generator().manual_seed(0)
    # Both with strides of their own, as views of wider projections.
    q_THX = torch.randn(T, H + 1, K + P + 2, generator=rng).to(dtype)[:, :H, : K + P]
    wide = torch.randn(T, 20, generator=rng).to(dtype)
    shared_TP = wide[:, 7 : 7 + P]
    before, q_before, shared_before = wide.clone(), q_THX.clone(), shared_TP.clone()
    positions = torch.tensor([0, 1, 7, 100, 4000])
    frequencies = torch.tensor([1.0, 0.3, 0.02, 1e-4])
    rope = Resolver().resolve(MLA_ROPE, CPU, MlaRopeDims(H=H, K=K, P=P))
    rope(q_THX, shared_TP, positions_T=positions, frequencies_F=frequencies, rope_scale=1.3)

    turn = 1.3 * torch.exp(1j * (positions[:, None] * frequencies.double()))

    def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(
            -2
        )

    tolerance = dict(rtol=2e-4, atol=2e-3) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(shared_TP.double(), turned(shared_before, turn), **tolerance)
    torch.testing.assert_close(q_THX[..., K:].double(), turned(q_before[..., K:], turn[:, None]), **tolerance)
    assert torch.equal(q_THX[..., :K], q_before[..., :K])
    wide[:, 7 : 7 + P] = before[:, 7 : 7 + P]
    assert torch.equal(wide, before)  # nothing beside it was touched


def test_decode_against_dense_attention() -> None:
    B, H, K, V, R, P, S = 3, 2, 6, 5, 8, 4, 4
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(B, H, K + P, generator=rng)
    blocks = torch.randn(9, S, R + P, generator=rng)
    w_uk, w_uv = torch.randn(H, K, R, generator=rng), torch.randn(H, V, R, generator=rng)
    tables = torch.tensor([[3, 1, 0], [2, 0, 0], [5, 8, 4]], dtype=torch.int32)
    lens = torch.tensor([7, 1, 12], dtype=torch.int32)
    for b, n in enumerate(lens.tolist()):  # what lies beyond a sequence may be anything
        blocks[tables[b, (n - 1) // S], (n - 1) % S + 1 :] = torch.nan
    decode = Resolver().resolve(MLA_DECODE, CPU, MlaDecodeDims(H=H, K=K, V=V, R=R, P=P, S=S))
    got = decode(q, blocks, block_tables_BN=tables, context_lens_B=lens, w_uk_HKR=w_uk, w_uv_HVR=w_uv, scale=0.4)
    for b, n in enumerate(lens.tolist()):
        cached = blocks[tables[b].long()].flatten(0, 1)[:n].double()
        for h in range(H):
            keys = torch.cat([cached[:, :R] @ w_uk[h].double().T, cached[:, R:]], -1)
            p = (keys @ q[b, h].double() * 0.4).softmax(0)
            truth = p @ cached[:, :R] @ w_uv[h].double().T
            torch.testing.assert_close(got[b, h * V : (h + 1) * V].double(), truth, rtol=1e-5, atol=1e-5)
