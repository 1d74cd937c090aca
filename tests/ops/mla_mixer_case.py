"""Random inputs of mla_mixer_decode and mla_decode, and their results in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.ops.kda_mixer_case import error


@dataclass
class MlaMixerCase:
    """Shuffled blocks; block 0 is a sink; every row that holds no token of a sequence is NaN."""

    proj: Tensor
    norm_weight: Tensor
    w_uk: Tensor
    w_uv: Tensor
    blocks: Tensor
    tables: Tensor
    lens: Tensor
    block_rows: Tensor
    scale: float
    eps: float
    frequencies: Tensor
    rope_scale: float

    def copy(self) -> MlaMixerCase:
        return replace(self, blocks=self.blocks.clone())

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        """What `op` gives; it writes into these blocks."""
        return op(
            self.proj,
            kv_norm_weight_R=self.norm_weight,
            w_uk_HKR=self.w_uk,
            w_uv_HVR=self.w_uv,
            blocks_MSC=self.blocks,
            block_tables_BN=self.tables,
            context_lens_B=self.lens,
            block_rows_B=self.block_rows,
            scale=self.scale,
            eps=self.eps,
        )

    @property
    def queries(self) -> Tensor:
        """Of the projection: its columns without the new latent. A view."""
        return self.proj[:, : -self.blocks.shape[-1]]

    @property
    def positions(self) -> Tensor:
        return self.lens.long() - 1

    def run_rotated(self, op: Callable[..., Tensor], **other: Any) -> Tensor:
        """What `op`, an mla_decode, gives of the queries, once the new latents are in the blocks as they are."""
        arguments = dict(
            positions_B=self.positions,
            frequencies_F=self.frequencies,
            rope_scale=self.rope_scale,
            w_uk_HKR=self.w_uk,
            w_uv_HVR=self.w_uv,
            blocks_MSC=self.blocks,
            block_tables_BN=self.tables,
            context_lens_B=self.lens,
            scale=self.scale,
        )
        self.blocks.flatten(0, 1)[self.block_rows] = self.proj[:, -self.blocks.shape[-1] :]
        return op(self.queries, **arguments | other)

    def rows(self, b: int) -> Tensor:
        """Rows of the flattened blocks that hold sequence b's tokens, in order."""
        size = self.blocks.shape[1]
        t = torch.arange(int(self.lens[b]), device=self.tables.device)
        return self.tables[b, t // size].long() * size + t % size


def mla_mixer_case(
    lens: list[int],
    H: int,
    K: int,
    R: int,
    P: int,
    V: int,
    block_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    spread: float = 1.0,
) -> MlaMixerCase:
    """`spread` is the magnitude of the queries: at 30 one token takes nearly all the weight."""
    rng = torch.Generator(device).manual_seed(seed)
    B, N = len(lens), max(-(-n // block_size) for n in lens) + 1

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    w = (randn(H, K + V, R) * R**-0.5).to(dtype)  # one matrix, as in the checkpoint: the two parts have gaps
    tables = torch.randperm(B * N, generator=rng, device=device).view(B, N).int() + 1
    proj = randn(B, H * (K + P) + R + P)
    proj[:, : H * (K + P)] *= spread
    case = MlaMixerCase(
        proj=proj.to(dtype),
        norm_weight=(1 + 0.1 * randn(R)).to(dtype),
        w_uk=w[:, :K],
        w_uv=w[:, K:],
        blocks=torch.full((B * N + 1, block_size, R + P), torch.nan, dtype=dtype, device=device),
        tables=tables,
        lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_rows=torch.empty(B, dtype=torch.int64, device=device),
        scale=(K + P) ** -0.5,
        eps=1e-5,
        frequencies=50000 ** -torch.linspace(0, 1, P // 2 + 1, device=device)[:-1],
        rope_scale=1.3,
    )
    flat = case.blocks.view(-1, R + P)
    for b in range(B):
        rows = case.rows(b)
        case.block_rows[b] = rows[-1]
        flat[rows[:-1]] = randn(len(rows) - 1, R + P).to(dtype)
    return case


def mla_mixer_fp64(case: MlaMixerCase) -> tuple[Tensor, Tensor]:
    """(o_BO, the row of the blocks that each sequence's new token gets)."""
    (H, K, R), P = case.w_uk.shape, case.blocks.shape[-1] - case.w_uk.shape[-1]
    q, c, shared = case.proj.double().split([H * (K + P), R, P], dim=-1)
    c = c * (c.square().mean(-1, keepdim=True) + case.eps).rsqrt() * case.norm_weight.double()
    new = torch.cat((c, shared), dim=-1)
    return attention_fp64(case, q, new), new


def mla_decode_fp64(case: MlaMixerCase) -> Tensor:
    """o_BO of rotated queries."""
    (H, K, R), P = case.w_uk.shape, case.blocks.shape[-1] - case.w_uk.shape[-1]
    q, new = case.proj.double().split([H * (K + P), R + P], dim=-1)
    # Angles as they are defined, in float32: far out, the rounding of a product is no small part of a turn.
    angles = (case.positions[:, None].float() * case.frequencies).double()
    turn = case.rope_scale * torch.exp(1j * angles)[:, None]
    q = q.unflatten(-1, (H, K + P)).clone()
    pairs = torch.view_as_complex(q[..., K:].unflatten(-1, (-1, 2)).contiguous())
    q[..., K:] = torch.view_as_real(pairs * turn).flatten(-2)
    return attention_fp64(case, q.flatten(1), new)


def attention_fp64(case: MlaMixerCase, q: Tensor, new: Tensor) -> Tensor:
    (H, K, R), flat = case.w_uk.shape, case.blocks.flatten(0, 1)
    q_BHX = q.unflatten(-1, (H, -1))
    q_BHC = torch.cat((torch.einsum("bhk,hkr->bhr", q_BHX[..., :K], case.w_uk.double()), q_BHX[..., K:]), dim=-1)
    o_BHR = q_BHC.new_empty(*q_BHC.shape[:2], R)
    for b in range(len(q)):
        # What a token's latent was rounded to when it was stored is what every later step reads.
        latent_SC = torch.cat((flat[case.rows(b)[:-1]], new[b : b + 1].to(flat.dtype))).double()
        o_BHR[b] = (q_BHC[b] @ latent_SC.T * case.scale).softmax(-1) @ latent_SC[:, :R]
    return torch.einsum("bhr,hvr->bhv", o_BHR, case.w_uv.double()).flatten(1)


def check_mla_mixer(op: Callable[..., Tensor], case: MlaMixerCase, tolerance: float) -> None:
    o, new = mla_mixer_fp64(case)
    after = case.copy()
    out = after.run(op)
    assert out.dtype == case.proj.dtype
    assert error(out, o) < tolerance
    flat, before = (x.blocks.flatten(0, 1) for x in (after, case))
    torch.testing.assert_close(flat[case.block_rows].double(), new, rtol=tolerance, atol=tolerance)
    others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    others[case.block_rows] = False
    torch.testing.assert_close(flat[others], before[others], rtol=0, atol=0, equal_nan=True)


def check_mla_decode(op: Callable[..., Tensor], case: MlaMixerCase, tolerance: float) -> None:
    after = case.copy()
    out = after.run_rotated(op)
    assert out.dtype == case.proj.dtype
    assert error(out, mla_decode_fp64(case)) < tolerance
    flat, before = (x.blocks.flatten(0, 1) for x in (after, case))
    before[case.block_rows] = case.proj[:, -before.shape[-1] :]
    assert torch.equal(flat.isnan(), before.isnan())
    assert torch.equal(flat.nan_to_num(), before.nan_to_num())
