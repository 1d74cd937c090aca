"""mla_prefill over expanded keys and values: latents gathered from the blocks, one product that makes keys and values
of them, and attention over these, which an implementation brings.

Contexts are expanded MAX_CONTEXT tokens at a time: several sequences together, or a part of a longer one, whose sums
then wait in fp32 for the next part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.host_tables import Contexts, PerStep, contexts, pieces, table

MAX_CONTEXT = 16384
GATHERED = 16  # tokens of a program that gathers


class Attend(Protocol):
    def __call__(
        self,
        q_LHX: Tensor,
        kv_SHX: Tensor,
        latent_SC: Tensor,
        o_LHV: Tensor,
        sums: tuple[Tensor, ...],
        offsets: Sequence[int],
        starts: Sequence[int],
        part: Contexts,
        scale: float,
    ) -> None:
        """Causal attention of queries at offsets[b]:offsets[b + 1], before which starts[b] tokens stand, over the
        contexts in `part`: their keys (without the shared part, which is in the last columns of latent_SC) and values
        stand side by side in kv_SHX.

        o_LHV is written; or `sums` are moved on, if there are any: fp32 sums of values [L, H, V], largest scores [L, H]
        (from minus infinity) and sums of weights [L, H], of one sequence.
        """


def prefill_by(
    attend: Attend,
    q_THX: Tensor,
    blocks_MSC: Tensor,
    *,
    block_tables_BN: Tensor,
    context_lens: Sequence[int],
    offsets: Sequence[int],
    up_HXR: Tensor,
    value_dims: int,
    scale: float,
) -> Tensor:
    from thalweg.ops.attention.mla.triton.gather import gather

    (T, H, X), V, R = q_THX.shape, value_dims, up_HXR.shape[2]
    q_THX = q_THX if q_THX.stride()[1:] == (X, 1) else q_THX.contiguous()
    o_THV = torch.empty(T, H, V, dtype=q_THX.dtype, device=q_THX.device)
    for b, end, total in _groups(context_lens, offsets):
        queries = slice(offsets[b], offsets[end])
        local = offsets if (b, end) == (0, len(context_lens)) else [n - offsets[b] for n in offsets[b : end + 1]]
        whole = total <= MAX_CONTEXT
        L = queries.stop - queries.start
        sums: tuple[Tensor, ...] = ()
        if not whole:
            acc_LHV = torch.zeros(L, H, V, dtype=torch.float32, device=q_THX.device)
            sums = (acc_LHV, acc_LHV.new_full((L, H), -torch.inf), acc_LHV.new_zeros(L, H))
        for lo in [0] if whole else range(0, total, MAX_CONTEXT):
            if whole:
                part = contexts(context_lens[b:end], local, GATHERED, q_THX.device)
            else:
                part = _part(lo, min(total, lo + MAX_CONTEXT), context_lens[b], q_THX.device)
            latent_SC = gather(blocks_MSC, block_tables_BN[b:end], part, GATHERED)
            kv_SHX = F.linear(latent_SC[:, :R], up_HXR.flatten(0, 1)).unflatten(1, (H, -1))
            starts = context_lens[b:end]
            attend(q_THX[queries], kv_SHX, latent_SC, o_THV[queries], sums, local, starts, part, scale)
        if sums:
            torch.div(sums[0], sums[2].unsqueeze(-1), out=o_THV[queries])
    return o_THV


def _groups(context_lens: Sequence[int], offsets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Ranges of sequences that have at most MAX_CONTEXT tokens together, or a single one that has more, and how many
    they have. A captured step, which is for so many in all, has one range."""
    if isinstance(offsets, PerStep):
        yield 0, len(context_lens), offsets.tables.limits.context
        return
    begin, tokens = 0, 0
    for b, (cached, before, after) in enumerate(zip(context_lens, offsets, offsets[1:], strict=False)):
        n = cached + after - before if after > before else 0
        if tokens and tokens + n > MAX_CONTEXT:
            yield begin, b, tokens
            tokens = 0
        begin = begin if tokens else b
        tokens += n
    if tokens:
        yield begin, len(context_lens), tokens


def _part(lo: int, hi: int, cached: int, device: torch.device) -> Contexts:
    """The tokens lo .. hi - 1 of one sequence."""
    return Contexts(hi - lo, pieces((0, hi - lo), GATHERED, device), table((lo, hi, cached), device).view(1, 3), lo)
