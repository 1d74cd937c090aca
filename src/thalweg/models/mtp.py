"""The layer behind a decoder that drafts tokens (multi-token prediction, arXiv:2412.19437), of any family's parts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from thalweg.cache.specs import LayerSpecs
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.linear import Linear
from thalweg.layers.norm import RMSNorm
from thalweg.models.decoder import DecoderLayer
from thalweg.models.family import DecoderConfig


class Mtp(nn.Module):
    """From what a decoder knows up to a position, and the token after it, to what it would know one position further.

    Position p of the layer's own cache holds the hidden state h[p] behind the decoder's last norm with the token at
    p + 1, so every position up to p has to be run, those of the prompt too. The output h'[p], through the decoder's
    head, drafts the token at p + 2. The next draft takes h'[p] with that token at p + 1; once the tokens are
    known, positions that drafts wrote are run again with the decoder's own hidden states.
    """

    def __init__(self, ctx: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        assert config.mtp is not None, "the weight plan refuses models without an MTP layer"
        ctx = replace(ctx, norm_fp32=config.shifted_norms)
        width, eps = config.width, config.eps
        self.embedding_norm = RMSNorm(ctx, width, eps)
        self.hidden_norm = RMSNorm(ctx, width, eps)
        self.fc = Linear(ctx.below("fc"), 2 * width, width)
        self.layer = DecoderLayer(ctx.below("layer"), config.mtp, width, eps)
        self.norm = RMSNorm(ctx, width, eps)

    @property
    def cache_specs(self) -> LayerSpecs:
        return self.layer.attn.cache_specs

    def forward(self, hidden_TD: Tensor, embedded_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """h'_TD [T, D], normed, for hidden states [T, D] and embeddings [T, D] of the tokens after them. `batch` has
        the positions of the hidden states; its own tokens are not looked at. `cache` is updated in place."""
        both_T2D = torch.cat([self.embedding_norm(embedded_TD), self.hidden_norm(hidden_TD)], dim=-1)
        out_TD: Tensor = self.norm(self.layer(self.fc(both_T2D), batch, cache))
        return out_TD
