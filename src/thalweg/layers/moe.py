"""Feed-forward blocks: dense SwiGLU, and a mixture of SwiGLU experts with shared experts.

A block begins with the residual add and norm behind the attention and ends with those before the next layer, so that
it may do them inside its own kernels: (y_TD, residual_TD, its norm, the next) -> (normed_TD, residual_TD).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.config.quantization import blocks
from thalweg.layers.context import BuildContext
from thalweg.layers.linear import Linear
from thalweg.layers.norm import RMSNorm


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), its width sharded; `what` names that width in errors."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, what: str) -> None:
        super().__init__()
        local = ctx.shard(inner, what)
        self.mesh = ctx.mesh
        self.gate_up = Linear(ctx, width, 2 * local)
        self.down = Linear(ctx, local, width)
        self._act = ctx.op("silu_and_mul", I=local)

    def forward(self, y_TD: Tensor, residual_TD: Tensor, norm: RMSNorm, next_norm: RMSNorm) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = norm(y_TD, residual_TD)
        return next_norm(self.mesh.all_reduce(self.down(self._act(self.gate_up(x_TD)))), residual_TD)


class Router(nn.Module):
    """Sigmoid scores; the bias steers the choice only (auxiliary-loss-free balancing, arXiv:2408.15664)."""

    def __init__(
        self,
        ctx: BuildContext,
        width: int,
        experts: int,
        *,
        top_k: int,
        renormalize: bool,
        scale: float,
        groups: int,
        topk_groups: int,
        shared: int,
    ) -> None:
        super().__init__()
        self.weight = ctx.weight(experts, width)
        self.bias = ctx.weight(experts, dtype=torch.float32)
        self.options = (top_k, renormalize, scale, "sigmoid", groups, topk_groups, shared)
        self._router = ctx.op("add_norm_router", E=experts, D=width, K=top_k, G=groups, S=shared)

    def forward(self, y_TD: Tensor, residual_TD: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(normed, residual) as `norm` gives them, and (weights float32, expert ids), both [T, top_k + shared]; the
        shared experts come last, with weight 1."""
        return self._router(y_TD, residual_TD, norm.weight, norm.eps, self.weight, self.bias, *self.options)


class Experts(nn.Module):
    """Weights of all experts, each `inner` wide on this rank: the routed ones, then the shared ones."""

    op = "experts"

    def __init__(self, ctx: BuildContext, width: int, routed: int, shared: int, inner: int) -> None:
        super().__init__()
        self.shared = shared
        self.mesh = ctx.mesh
        self._make_weights(ctx, routed + shared, width, inner)
        op = f"{self.op}_add_norm" if ctx.mesh.tp_size == 1 else self.op
        self._experts = ctx.op(op, E=routed + shared, D=width, I=inner)

    def _make_weights(self, ctx: BuildContext, total: int, width: int, inner: int) -> None:
        self.gate_up = ctx.weight(total, 2 * inner, width)
        self.down = ctx.weight(total, width, inner)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """As the op takes them."""
        return self.gate_up, self.down

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor, next_norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """(norm(r), r), r_TD the residual plus the experts' weighted sum."""
        weights = (weights_Tk, ids_Tk, *self.weights)
        if self.mesh.tp_size == 1:
            y_TD, residual_TD = self._experts(
                x_TD, *weights, residual_TD, next_norm.weight, next_norm.eps, num_shared=self.shared
            )
            return y_TD, residual_TD
        # The sum over ranks comes before the residual add.
        return next_norm(self.mesh.all_reduce(self._experts(x_TD, *weights, num_shared=self.shared)), residual_TD)


class Fp8Experts(Experts):
    """Experts whose weights are float8_e4m3fn, one float32 scale a block; gate and up have blocks of their own."""

    op = "experts_fp8"

    def _make_weights(self, ctx: BuildContext, total: int, width: int, inner: int) -> None:
        fp8, f32 = torch.float8_e4m3fn, torch.float32
        self.gate_up = ctx.weight(total, 2 * inner, width, dtype=fp8)
        self.gate_up_scale = ctx.weight(total, 2 * blocks(inner), blocks(width), dtype=f32)
        self.down = ctx.weight(total, width, inner, dtype=fp8)
        self.down_scale = ctx.weight(total, blocks(width), blocks(inner), dtype=f32)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.gate_up, self.gate_up_scale, self.down, self.down_scale


class MoE(nn.Module):
    """Routed experts and, as further experts that every token takes with weight 1, the shared ones."""

    def __init__(
        self,
        ctx: BuildContext,
        *,
        width: int,
        experts: int,
        inner: int,
        shared: int,
        top_k: int,
        renormalize: bool,
        scale: float,
        groups: int,
        topk_groups: int,
    ) -> None:
        super().__init__()
        self.router = Router(
            ctx,
            width,
            experts,
            top_k=top_k,
            renormalize=renormalize,
            scale=scale,
            groups=groups,
            topk_groups=topk_groups,
            shared=shared,
        )
        kind = Experts if ctx.quantization is None else Fp8Experts
        self.experts = kind(ctx, width, experts, shared, ctx.shard(inner, "moe_intermediate_size"))

    def forward(self, y_TD: Tensor, residual_TD: Tensor, norm: RMSNorm, next_norm: RMSNorm) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD, weights_Tk, ids_Tk = self.router(y_TD, residual_TD, norm)
        return self.experts(x_TD, residual_TD, weights_Tk, ids_Tk, next_norm)
