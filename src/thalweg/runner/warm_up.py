"""Prefills before the first request, so that none of the kernels is compiled while it waits."""

from __future__ import annotations

import torch

from thalweg.cache.storage import CacheStorage
from thalweg.layers.batch import Batch
from thalweg.runner.decode_graphs import Model

LENGTHS = (64, 1024, 8192)  # kernels for few tokens, for many but few an expert, and for many an expert


@torch.inference_mode()
def warm_up(model: Model, cache: CacheStorage, device: torch.device, max_tokens: int) -> None:
    """Run the model on one made-up sequence of each length up to `max_tokens`, in slot 0 and page 0, the sinks."""
    for length in sorted({min(n, max_tokens) for n in LENGTHS}):
        pages = -(-length // cache.block_size)
        zeros = torch.zeros(length, dtype=torch.int64, device=device)
        model(
            Batch(
                token_ids_T=zeros,
                num_decodes=0,
                slots_B=zeros[:1],
                block_tables_BN=torch.zeros(1, pages, dtype=torch.int32, device=device),
                page_rows_T=zeros,
                decode_lens_B=zeros[:0].int(),
                prefill_starts=[0],
                prefill_offsets=[0, length],
                logit_rows_R=zeros[:1],
            ),
            cache,
        )
