"""Kimi Delta Attention (Kimi Linear, arXiv:2510.26692): a gated delta rule with a decay per key channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.cache.specs import StateSpec
from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.linear import LinearAdd, NormLinear


class LowRankUp(nn.Module):
    """The up-projections f_b and g_b [H*K, R] as one batched matrix [2, H*K, R]."""

    def __init__(self, ctx: BuildContext, rank: int, out_features: int) -> None:
        super().__init__()
        self.weight = ctx.weight(2, out_features, rank)
        self._op = ctx.op("batched_projection", R=rank, O=out_features)

    def forward(self, x_T2R: Tensor) -> Tensor:
        return self._op(x_T2R, self.weight)


class ShortConv(nn.Module):
    """The depthwise convolutions of q, k and v as one over all their channels [3*H*K, taps]."""

    def __init__(self, ctx: BuildContext, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = ctx.weight(channels, taps)


class KimiDeltaAttention(nn.Module):
    """x_TD -> x + mixed(norm(x)) over this rank's heads. Caches StateSpecs "conv" (taps - 1, 3*H*K) and
    "recurrent" (H, V, K).

    q, k, v, beta, f_a and g_a come from one matrix; f_b and g_b from one batched matrix; q, k and v share one conv.
    """

    def __init__(
        self, ctx: BuildContext, *, width: int, heads: int, head_dim: int, rank: int, taps: int, eps: float
    ) -> None:
        super().__init__()
        H, K = ctx.shards.count(heads, "the number of KDA heads"), head_dim
        self.H, self.K, self.R, self.eps = H, K, rank, eps
        self.split = [3 * H * K, H, 2 * rank]
        self.in_proj = NormLinear(ctx, width, sum(self.split), eps)
        self.up_proj = LowRankUp(ctx, rank, H * K)
        self.conv = ShortConv(ctx, 3 * H * K, taps)
        self.A_log = ctx.weight(H, dtype=torch.float32)
        self.dt_bias = ctx.weight(H, K, dtype=torch.float32)
        self.out_norm = nn.Module()
        self.out_norm.weight = ctx.weight(K)
        self.out_proj = LinearAdd(ctx, H * K, width)
        self.cache_specs = {
            "conv": StateSpec((taps - 1, 3 * H * K), ctx.dtype_name),
            "recurrent": StateSpec((H, K, K), ctx.state_dtype),
        }
        dims = {"H": H, "K": K, "V": K}
        self._mixer_decode = ctx.op("kda_mixer_decode", **dims, R=rank, W=taps - 1)
        self._conv = ctx.op("conv1d_prefill", C=3 * H * K, W=taps - 1)
        self._gate = ctx.op("kda_gate", **dims)
        self._prefill = ctx.op("kda_prefill", **dims)
        self._gated_norm = ctx.op("gated_rms_norm", H=H, V=K)

    def forward(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        proj_TX = self.in_proj(x_TD)
        n, parts = batch.num_decodes, []
        if n:
            parts.append(self._mix_decode(proj_TX[:n], batch.slots_B[:n], cache))
        if n < len(proj_TX):
            parts.append(self._mix_prefill(proj_TX[n:], batch.slots_B[n:], batch.prefill_offsets, cache))
        return self.out_proj.of_parts(parts, x_TD)

    def _mix_decode(self, proj_BX: Tensor, slots_B: Tensor, cache: LayerCache) -> Tensor:
        return self._mixer_decode(
            proj_BX,
            self.conv.weight,
            cache["conv"],
            self.up_proj.weight,
            self.A_log,
            self.dt_bias,
            self.out_norm.weight,
            self.eps,
            cache["recurrent"],
            slots_B,
        )

    def _mix_prefill(self, proj_TX: Tensor, slots_B: Tensor, offsets: list[int], cache: LayerCache) -> Tensor:
        H, K, R = self.H, self.K, self.R
        qkv_TC, beta_TH, low_T2R = proj_TX.split(self.split, dim=-1)
        up_T2O = self.up_proj(low_T2R.unflatten(-1, (2, R)))  # t (two r) -> t two r
        g_THK = self._gate(up_T2O[:, 0].unflatten(-1, (H, K)), self.A_log, self.dt_bias)
        qkv_TC = self._conv(qkv_TC, cache["conv"], slots_B, offsets, self.conv.weight)
        q, k, v = qkv_TC.unflatten(-1, (3, H, K)).unbind(1)  # t (three h k) -> three of t h k
        o_THV = self._prefill(q, k, v, g_THK, beta_TH.float().sigmoid(), cache["recurrent"], slots_B, offsets)
        o_THV = self._gated_norm(o_THV, up_T2O[:, 1].unflatten(-1, (H, K)), self.out_norm.weight, self.eps)
        return o_THV.flatten(1)  # t h v -> t (h v)

    def unfused_projections(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, beta, f, g by eight matrix products, as the checkpoint has them: the reference that the fused form
        is tested and timed against. Shapes [T, H*K] x 3, [T, H], [T, H*K] x 2."""
        HK, R = self.H * self.K, self.R
        w_q, w_k, w_v, w_beta, w_fa, w_ga = self.in_proj.weight.split([HK, HK, HK, self.H, R, R])
        w_fb, w_gb = self.up_proj.weight.unbind(0)
        first = tuple(F.linear(x_TD, w) for w in (w_q, w_k, w_v, w_beta))
        return (*first, F.linear(F.linear(x_TD, w_fa), w_fb), F.linear(F.linear(x_TD, w_ga), w_gb))

    def fused_projections(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """The same six tensors by one matrix product and one batched one, as `forward` has them."""
        HK = self.H * self.K
        qkv, beta, low = F.linear(x_TD, self.in_proj.weight).split(self.split, dim=-1)
        return (*qkv.split(HK, dim=-1), beta, *self.up_proj(low.unflatten(-1, (2, self.R))).unbind(1))
