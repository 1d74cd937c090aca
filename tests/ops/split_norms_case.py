"""Random inputs of op "split_norms", and what two implementations of it give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SplitNormsCase:
    """Block 0 is a sink, and all that is not written is NaN."""

    x: Tensor
    q_weight: Tensor | None
    kv_weight: Tensor
    positions: Tensor
    frequencies: Tensor
    blocks: Tensor
    block_rows: Tensor
    eps: float = 1e-6
    rope_scale: float = 1.3

    def run(self, op: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(q, the blocks' rows of the tokens, the other rows)."""
        blocks = self.blocks.clone()
        q = op(
            self.x,
            self.q_weight,
            self.kv_weight,
            self.eps,
            positions_T=self.positions,
            frequencies_F=self.frequencies,
            rope_scale=self.rope_scale,
            blocks_MSC=blocks,
            block_rows_T=self.block_rows,
        )
        flat = blocks.flatten(0, 1)
        others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        others[self.block_rows] = False
        return q, flat[self.block_rows], flat[others]


def split_norms_case(
    T: int, Q: int, R: int, P: int, dtype: torch.dtype, device: str = "cpu", gap: int = 0, rotated: bool = True
) -> SplitNormsCase:
    rng = torch.Generator(device).manual_seed(T)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    S = 4
    blocks = torch.full((T // S + 2, S, R + P), torch.nan, dtype=dtype, device=device)
    return SplitNormsCase(
        x=(randn(T, Q + R + P + gap) * 3).to(dtype)[:, : Q + R + P],
        q_weight=randn(Q).to(dtype) if Q else None,
        kv_weight=randn(R).to(dtype),
        positions=torch.randint(0, 130_000, (T,), generator=rng, device=device),
        frequencies=50000 ** -torch.linspace(0, 1, P // 2 if rotated else 0, device=device),
        blocks=blocks,
        block_rows=torch.randperm(blocks[1:, :, 0].numel(), generator=rng, device=device)[:T] + S,
    )


def check_same_bits(case: SplitNormsCase) -> None:
    """One launch and a launch for each part write the same bits, and nothing else."""
    from thalweg.ops.attention.mla_down_norms.triton import split_norms, split_norms_by_parts

    fused, by_parts = case.run(split_norms), case.run(split_norms_by_parts)
    assert torch.equal(fused[0], by_parts[0])
    assert torch.equal(fused[1], by_parts[1])
    assert bool(fused[2].isnan().all())
    assert bool(by_parts[2].isnan().all())
