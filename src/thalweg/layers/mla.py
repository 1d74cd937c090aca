"""Multi-head latent attention against a paged latent cache: without positions (NoPE), or with rotated ones.

DeepSeek-V2 (arXiv:2405.04434) for the latent form; Kimi Linear leaves the "rope" dimensions unrotated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thalweg.cache.specs import PagedSpec
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.linear import Linear, LinearAdd, NormLinear
from thalweg.layers.norm import NormWeight
from thalweg.ops.attention.mla import MLA_PREFILL, MlaPrefillDims
from thalweg.ops.attention.mla_down_norms import SPLIT_NORMS, SplitNormsDims
from thalweg.ops.attention.mla_mixer import MLA_DECODE, MLA_MIXER_DECODE, MlaMixerDims
from thalweg.ops.attention.mla_rope import MLA_ROPE, MlaRopeDims
from thalweg.ops.norm import NextNorm, Normed


class LatentUp(nn.Module):
    """kv_b_proj per head: weight [H, nope + V, R]."""

    def __init__(self, ctx: BuildContext, heads: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = ctx.weight(heads, out_features, rank)


class LatentAttention(nn.Module):
    """What both kinds share: x_TD -> x + attention(norm(x)) over this rank's heads. Caches PagedSpec "latent" (R + P,):
    the normed latent and the shared "rope" key.

    Decode is absorbed: queries move into latent space and one read of the cache serves all heads. Prefill expands.
    """

    def __init__(
        self, ctx: BuildContext, *, width: int, heads: int, nope: int, rope: int, value: int, rank: int, scale: float
    ) -> None:
        super().__init__()
        H = ctx.shards.count(heads, "num_attention_heads")
        self.H, self.nope, self.rope, self.value, self.rank, self.scale = H, nope, rope, value, rank, scale
        self.kv_b_proj = LatentUp(ctx, H, nope + value, rank)
        self.out_proj = LinearAdd(ctx.below("out_proj"), H * value, width)
        self.cache_specs = {"latent": PagedSpec((rank + rope,), ctx.dtype_name)}
        self.sizes = {"H": H, "K": nope, "V": value, "R": rank, "P": rope}
        self._prefill = ctx.op(MLA_PREFILL, MlaPrefillDims(**self.sizes))

    def up_weights(self) -> tuple[Tensor, Tensor]:
        """w_uk [H, nope, R] and w_uv [H, V, R]."""
        w_uk_HKR, w_uv_HVR = self.kv_b_proj.weight.split([self.nope, self.value], dim=1)
        return w_uk_HKR, w_uv_HVR

    def of_prefills(self, q_THX: Tensor, latent_MSC: Tensor, batch: Batch) -> Tensor:
        """o_TO of the tokens that are not decode rows, whose latents are in the cache already."""
        o_THV = self._prefill(
            q_THX,
            latent_MSC,
            block_tables_BN=batch.block_tables_BN[batch.num_decodes :],
            context_lens=batch.starts,
            offsets=batch.prefill_offsets,
            up_HXR=self.kv_b_proj.weight,
            value_dims=self.value,
            scale=self.scale,
        )
        return o_THV.flatten(1)  # t h v -> t (h v)


class MultiHeadLatentAttention(LatentAttention):
    """Without positions: a decode row's mixer is one op, from the projection of q and latent to the heads' outputs."""

    frequencies_F: Tensor  # none

    def __init__(
        self, ctx: BuildContext, *, width: int, heads: int, nope: int, rope: int, value: int, rank: int, eps: float
    ) -> None:
        scale = (nope + rope) ** -0.5
        super().__init__(ctx, width=width, heads=heads, nope=nope, rope=rope, value=value, rank=rank, scale=scale)
        self.queries = self.H * (nope + rope)  # columns of in_proj, which has q_proj and kv_a_proj in one
        self.in_proj = NormLinear(ctx.below("in_proj"), width, [self.queries, rank + rope], eps)
        self.kv_norm = NormWeight(ctx, rank, eps)
        self.register_buffer("frequencies_F", torch.empty(0, device=ctx.device))
        self._norms = ctx.op(SPLIT_NORMS, SplitNormsDims(Q=0, R=rank, P=rope, rotated=False))
        self._mixer_decode = ctx.op(MLA_MIXER_DECODE, MlaMixerDims(**self.sizes, S=ctx.block_size))

    def forward(
        self,
        x_TD: Tensor,
        batch: Batch,
        cache: LayerCache,
        normed: Normed | None = None,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        proj_TX, latent_MSC = self.in_proj(x_TD, normed), cache["latent"]
        n, parts = batch.num_decodes, []
        if n:
            w_uk_HKR, w_uv_HVR = self.up_weights()
            parts.append(
                self._mixer_decode(
                    proj_TX[:n],
                    kv_norm_weight_R=self.kv_norm.weight,
                    w_uk_HKR=w_uk_HKR,
                    w_uv_HVR=w_uv_HVR,
                    blocks_MSC=latent_MSC,
                    block_tables_BN=batch.block_tables_BN[:n],
                    context_lens_B=batch.context_lens_B,
                    block_rows_B=batch.block_rows_T[:n],
                    scale=self.scale,
                    eps=self.kv_norm.eps,
                )
            )
        if n < proj_TX.shape[0]:
            self._norms(
                proj_TX[n:, self.queries :],
                None,
                self.kv_norm.weight,
                self.kv_norm.eps,
                positions_T=batch.positions_T[n:],
                frequencies_F=self.frequencies_F,
                rope_scale=1.0,
                blocks_MSC=latent_MSC,
                block_rows_T=batch.block_rows_T[n:],
            )
            q_THX = proj_TX[n:, : self.queries].unflatten(-1, (self.H, -1))  # t (h x) -> t h x
            parts.append(self.of_prefills(q_THX, latent_MSC, batch))
        return self.out_proj.of_parts(parts, x_TD, next_norm)


class RotatedLatentAttention(LatentAttention):
    """With rotated positions, and queries through a normed projection of `q_rank` values (None: straight from the
    input). `frequencies` are the angles per position of the pairs that are rotated, `rope_scale` multiplies their
    cosines and sines, and `scale` all scores."""

    frequencies_F: Tensor

    def __init__(
        self,
        ctx: BuildContext,
        *,
        width: int,
        heads: int,
        nope: int,
        rope: int,
        value: int,
        rank: int,
        eps: float,
        scale: float,
        q_rank: int | None,
        frequencies: Sequence[float],
        rope_scale: float,
    ) -> None:
        super().__init__(ctx, width=width, heads=heads, nope=nope, rope=rope, value=value, rank=rank, scale=scale)
        queries = self.H * (nope + rope)
        self.low_rank, self.rope_scale = q_rank is not None, rope_scale
        self.direct = queries if q_rank is None else 0  # columns of in_proj that are queries
        self.in_proj = NormLinear(ctx.below("in_proj"), width, [q_rank or queries, rank + rope], eps)
        self.kv_norm = NormWeight(ctx, rank, eps)
        if q_rank is not None:
            self.q_norm = NormWeight(ctx, q_rank, eps)
            self.q_b_proj = Linear(ctx.below("q_b_proj"), q_rank, queries)
        self.register_buffer("frequencies_F", torch.tensor(frequencies, dtype=torch.float32, device=ctx.device))
        self._norms = ctx.op(SPLIT_NORMS, SplitNormsDims(Q=q_rank or 0, R=rank, P=rope))
        self._rotate = ctx.op(MLA_ROPE, MlaRopeDims(H=self.H, K=nope, P=rope))
        self._decode = ctx.op(MLA_DECODE, MlaMixerDims(**self.sizes, S=ctx.block_size))

    def forward(
        self,
        x_TD: Tensor,
        batch: Batch,
        cache: LayerCache,
        normed: Normed | None = None,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        latent_MSC = cache["latent"]
        q_TO = self._queries(self.in_proj(x_TD, normed), latent_MSC, batch)
        n, parts = batch.num_decodes, []
        if n:
            w_uk_HKR, w_uv_HVR = self.up_weights()
            parts.append(
                self._decode(
                    q_TO[:n],
                    positions_B=batch.positions_T[:n],
                    frequencies_F=self.frequencies_F,
                    rope_scale=self.rope_scale,
                    w_uk_HKR=w_uk_HKR,
                    w_uv_HVR=w_uv_HVR,
                    blocks_MSC=latent_MSC,
                    block_tables_BN=batch.block_tables_BN[:n],
                    context_lens_B=batch.context_lens_B,
                    scale=self.scale,
                )
            )
        if n < q_TO.shape[0]:
            q_THX = q_TO[n:].unflatten(-1, (self.H, -1))  # t (h x) -> t h x
            self._rotate(
                q_THX,
                positions_T=batch.positions_T[n:],
                frequencies_F=self.frequencies_F,
                rope_scale=self.rope_scale,
            )
            parts.append(self.of_prefills(q_THX, latent_MSC, batch))
        return self.out_proj.of_parts(parts, x_TD, next_norm)

    def _queries(self, proj_TX: Tensor, latent_MSC: Tensor, batch: Batch) -> Tensor:
        """q_TO, not rotated; latents and rotated shared keys of all tokens are in the cache."""
        queries_TO, low_TX = proj_TX[:, : self.direct], proj_TX[:, self.direct :]
        q_TQ = self._norms(
            low_TX,
            self.q_norm.weight if self.low_rank else None,
            self.kv_norm.weight,
            self.kv_norm.eps,
            positions_T=batch.positions_T,
            frequencies_F=self.frequencies_F,
            rope_scale=self.rope_scale,
            blocks_MSC=latent_MSC,
            block_rows_T=batch.block_rows_T,
        )
        if self.low_rank:
            queries_TO = self.q_b_proj(q_TQ)
        return queries_TO
