"""Kimi-Linear: which layer stands where. The parts are in layers/, the checkpoint's names in weights.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thalweg.cache.specs import LayerSpecs
from thalweg.cache.storage import CacheStorage
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.delta import KimiDeltaAttention
from thalweg.layers.linear import VocabEmbedding, VocabHead
from thalweg.layers.mla import MultiHeadLatentAttention
from thalweg.layers.moe import MoE, SwiGLU
from thalweg.models.kimi_linear.config import KimiLinearConfig


class KimiLinearLayer(nn.Module):
    def __init__(self, ctx: BuildContext, c: KimiLinearConfig, index: int) -> None:
        super().__init__()
        self.attn: KimiDeltaAttention | MultiHeadLatentAttention
        if index in c.kda_layers:
            assert c.kda is not None
            self.attn = KimiDeltaAttention(
                ctx,
                width=c.hidden_size,
                heads=c.kda.num_heads,
                head_dim=c.kda.head_dim,
                rank=c.kda.gate_rank,
                taps=c.kda.conv_kernel,
                eps=c.rms_norm_eps,
            )
        else:
            assert c.mla is not None
            self.attn = MultiHeadLatentAttention(
                ctx,
                width=c.hidden_size,
                heads=c.mla.num_heads,
                nope=c.mla.qk_nope_head_dim,
                rope=c.mla.qk_rope_head_dim,
                value=c.mla.v_head_dim,
                rank=c.mla.kv_lora_rank,
                eps=c.rms_norm_eps,
            )
        self.mlp: MoE | SwiGLU
        if index in c.moe_layers:
            assert c.moe is not None
            self.mlp = MoE(
                ctx,
                width=c.hidden_size,
                eps=c.rms_norm_eps,
                experts=c.moe.num_experts,
                inner=c.moe.intermediate_size,
                shared=c.moe.num_shared,
                top_k=c.moe.top_k,
                renormalize=c.moe.renormalize,
                scale=c.moe.scale,
                groups=c.moe.num_groups,
                topk_groups=c.moe.top_groups,
            )
        else:
            self.mlp = SwiGLU(ctx, c.hidden_size, c.intermediate_size, c.rms_norm_eps, "intermediate_size")

    def forward(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        return self.mlp(self.attn(x_TD, batch, cache))


class KimiLinearModel(nn.Module):
    """forward(batch, cache) -> logits [R, V] of the rows the batch names; the cache is updated in place."""

    def __init__(self, ctx: BuildContext, config: KimiLinearConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = VocabEmbedding(ctx, config.vocab_size, config.hidden_size)
        self._stack = [KimiLinearLayer(ctx, config, i) for i in range(config.num_layers)]
        self.layers = nn.ModuleList(self._stack)
        self.lm_head = VocabHead(ctx, config.vocab_size, config.hidden_size, config.rms_norm_eps)

    @property
    def cache_specs(self) -> list[LayerSpecs]:
        return [layer.attn.cache_specs for layer in self._stack]

    def one_of_each(self) -> list[int]:
        """The first layer of each kind: between them they use every kernel of the stack."""
        kinds = {(type(layer.attn), type(layer.mlp)): i for i, layer in reversed(list(enumerate(self._stack)))}
        return sorted(kinds.values())

    def forward(self, batch: Batch, cache: CacheStorage, layers: Sequence[int] | None = None) -> Tensor:
        """`layers` are those to run, for a rehearsal; None runs all."""
        x_TD: Tensor = self.embed(batch.token_ids_T)
        for i in range(len(self._stack)) if layers is None else layers:
            x_TD = self._stack[i](x_TD, batch, cache.layers[i])
        return self.lm_head(x_TD if batch.logit_rows_R is None else x_TD[batch.logit_rows_R])
