"""Latents of several sequences, or of spans of them, gathered from the blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.host_tables import Contexts


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["offsets_ptr", "block_tables_ptr"])
def gather_kernel(
    blocks_ptr,
    block_tables_ptr,
    latent_ptr,  # [S, C]
    pieces_ptr,
    offsets_ptr,
    spans_ptr,
    table_stride,
    block_size,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GATHERED: tl.constexpr,
):
    sequence = tl.load(pieces_ptr + 2 * tl.program_id(0))
    row = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1) + tl.arange(0, GATHERED)
    start = tl.load(offsets_ptr + sequence)
    inside = row < tl.load(offsets_ptr + sequence + 1)
    position = tl.load(spans_ptr + 3 * sequence) + row - start
    block = tl.load(block_tables_ptr + sequence * table_stride + position // block_size, mask=inside, other=0)
    source = block.to(tl.int64) * block_size + position % block_size
    c = tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (c < C)[None, :]
    values = tl.load(blocks_ptr + source[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(latent_ptr + row.to(tl.int64)[:, None] * C + c[None, :], values, mask=mask)


def gather(blocks_MSC: Tensor, block_tables_BN: Tensor, part: Contexts, gathered: int) -> Tensor:
    """latent_SC of the contexts, one sequence after another; `gathered` is how many tokens a piece of `part` has. What
    is beyond the contexts in a captured step is anything."""
    _, block_size, C = blocks_MSC.shape
    latent_SC = torch.empty(part.total, C, dtype=blocks_MSC.dtype, device=blocks_MSC.device)
    gather_kernel[(part.cut.num,)](
        blocks_MSC,
        block_tables_BN,
        latent_SC,
        part.cut.pieces_N2,
        part.cut.offsets_B1,
        part.totals_B3,
        block_tables_BN.stride(0),
        block_size,
        C,
        triton.next_power_of_2(C),
        gathered,
        num_warps=8,
    )
    return latent_SC
