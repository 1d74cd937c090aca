"""The stack of every family: embedding, layers of a mixer and a feed-forward block, norm and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from thalweg.cache.specs import LayerSpecs
from thalweg.cache.storage import CacheStorage
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.gdn import GatedDeltaNet
from thalweg.layers.gqa import GatedAttention
from thalweg.layers.kda import KimiDeltaAttention
from thalweg.layers.linear import VocabEmbedding, VocabHead
from thalweg.layers.mla import MultiHeadLatentAttention, RotatedLatentAttention
from thalweg.layers.moe import MoE, SwiGLU
from thalweg.models.family import DecoderConfig, FeedForward, LayerConfig, Mixer
from thalweg.models.parts.gdn import GdnDims
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.ops.norm import NextNorm, Normed

MixerModule = KimiDeltaAttention | MultiHeadLatentAttention | RotatedLatentAttention | GatedDeltaNet | GatedAttention


def _mixer(ctx: BuildContext, dims: Mixer, width: int, eps: float) -> MixerModule:
    if isinstance(dims, KdaDims):
        return KimiDeltaAttention(
            ctx, width=width, eps=eps, heads=dims.heads, head_dim=dims.head_dim, rank=dims.rank, taps=dims.taps
        )
    if isinstance(dims, MlaDims):
        sizes = {"heads": dims.heads, "rank": dims.rank, "nope": dims.nope, "rope": dims.rope, "value": dims.value}
        if dims.rotation is None:
            return MultiHeadLatentAttention(ctx, width=width, eps=eps, **sizes)
        return RotatedLatentAttention(
            ctx,
            width=width,
            eps=eps,
            **sizes,
            scale=dims.scale,
            q_rank=dims.q_rank,
            frequencies=dims.rotation.frequencies,
            rope_scale=dims.rotation.scale,
        )
    if isinstance(dims, GdnDims):
        return GatedDeltaNet(
            ctx,
            width=width,
            eps=eps,
            key_heads=dims.key_heads,
            value_heads=dims.value_heads,
            key_dim=dims.key_dim,
            value_dim=dims.value_dim,
            taps=dims.taps,
        )
    return GatedAttention(
        ctx,
        width=width,
        eps=eps,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        frequencies=dims.rope.frequencies,
        rope_scale=dims.rope.scale,
    )


def _feed_forward(ctx: BuildContext, dims: FeedForward, width: int, eps: float) -> SwiGLU | MoE:
    if isinstance(dims, MlpDims):
        return SwiGLU(ctx, width, dims.inner, eps)
    return MoE(
        ctx,
        width=width,
        eps=eps,
        experts=dims.experts,
        inner=dims.inner,
        shared=dims.shared,
        top_k=dims.top_k,
        renormalize=dims.renormalize,
        scale=dims.scale,
        groups=dims.groups,
        topk_groups=dims.top_groups,
        scoring=dims.scoring,
        gated_shared=dims.gated_shared,
    )


class DecoderLayer(nn.Module):
    """x_TD -> mlp(attn(x)); both add to the residual stream themselves."""

    def __init__(self, ctx: BuildContext, layer: LayerConfig, width: int, eps: float) -> None:
        super().__init__()
        self.attn = _mixer(ctx.below("attn"), layer.mixer, width, eps)
        self.mlp = _feed_forward(ctx.below("mlp"), layer.mlp, width, eps)

    def forward(
        self,
        x_TD: Tensor,
        batch: Batch,
        cache: LayerCache,
        normed: Normed | None = None,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        """`normed`: what the layer's first norm gives of x, if it is known. `next_norm`: that of the layer behind,
        which is told of the result if an op computes it on the way."""
        mlp_norm = self.mlp.own_norm() if isinstance(self.mlp, MoE) else None
        x_TD = self.attn(x_TD, batch, cache, normed, mlp_norm)
        known_TD = None if mlp_norm is None else mlp_norm.normed_TD
        out_TD: Tensor = self.mlp(x_TD, next_norm) if known_TD is None else self.mlp(x_TD, next_norm, known_TD)
        return out_TD


class Decoder(nn.Module):
    """forward(batch, cache) -> logits [R, V] of the rows the batch names; the cache is updated in place."""

    def __init__(self, ctx: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        ctx = replace(ctx, norm_fp32=config.shifted_norms)
        self.config = config
        if config.vocab.tied and "embed.weight" in ctx:
            ctx = replace(ctx, plan={**ctx.plan, "lm_head.weight": ctx.plan["embed.weight"]})
        self.embed = VocabEmbedding(ctx.below("embed"), config.vocab.size, config.width)
        self._stack = [
            DecoderLayer(ctx.below(f"layers.{i}"), layer, config.width, config.eps)
            for i, layer in enumerate(config.layers)
        ]
        self.layers = nn.ModuleList(self._stack)
        self.lm_head = VocabHead(ctx.below("lm_head"), config.vocab.size, config.width, config.eps)
        if config.vocab.tied:
            self.lm_head.weight = self.embed.weight

    @property
    def cache_specs(self) -> list[LayerSpecs]:
        return [layer.attn.cache_specs for layer in self._stack]

    def one_of_each(self) -> list[int]:
        """The first layer of each kind: between them they use every kernel of the stack."""
        kinds = {layer: i for i, layer in reversed(list(enumerate(self.config.layers)))}
        return sorted(kinds.values())

    def stream(self, batch: Batch, cache: CacheStorage, layers: Sequence[int] | None = None) -> Tensor:
        """The residual stream [T, D] behind the last layer, which the head's norm comes after."""
        x_TD: Tensor = self.embed(batch.token_ids_T)
        normed: Normed | None = None
        for i in range(len(self._stack)) if layers is None else layers:
            after = self._stack[i + 1 : i + 2]
            next_norm = after[0].attn.in_proj.next_norm() if after else None
            x_TD = self._stack[i](x_TD, batch, cache.layers[i], normed, next_norm)
            normed = None if next_norm is None else next_norm.known
        return x_TD

    def serve_others(self) -> None:
        """A step without tokens: what data-parallel ranks with tokens need of this one's experts."""
        for layer in self._stack:
            if isinstance(layer.mlp, MoE):
                layer.mlp.serve_others()

    def expert_counts(self) -> dict[int, list[int]]:
        """By layer, how many of this data-parallel rank's tokens each expert got since this was first asked."""
        mlps = ((i, layer.mlp) for i, layer in enumerate(self._stack))
        return {i: mlp.expert_counts() for i, mlp in mlps if isinstance(mlp, MoE)}

    def forward(self, batch: Batch, cache: CacheStorage, layers: Sequence[int] | None = None) -> Tensor:
        """`layers` are those to run, for a rehearsal; None runs all."""
        x_TD = self.stream(batch, cache, layers)
        x_RD = x_TD if batch.logit_rows_R is None else x_TD[batch.logit_rows_R]
        logits_RV: Tensor = self.lm_head(x_RD, gathers=batch.gathers)
        return logits_RV
