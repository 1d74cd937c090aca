"""Feed-forward blocks: dense SwiGLU, and a mixture of SwiGLU experts with shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.config.quantization import blocks
from thalweg.layers.context import BuildContext
from thalweg.layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), its width sharded; `what` names that width in errors."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, what: str) -> None:
        super().__init__()
        local = ctx.shard(inner, what)
        self.mesh = ctx.mesh
        self.gate_up = Linear(ctx, width, 2 * local)
        self.down = Linear(ctx, local, width)
        self._act = ctx.op("silu_and_mul", I=local)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.mesh.all_reduce(self.down(self._act(self.gate_up(x_TD))))


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
        self._router = ctx.op("router", E=experts, D=width, K=top_k, G=groups, S=shared)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(weights float32, expert ids), both [T, top_k + shared]; the shared experts come last, with weight 1."""
        weights, ids = self._router(x_TD, self.weight, self.bias, *self.options)
        return weights, ids


class Experts(nn.Module):
    """Weights of all experts, each `inner` wide on this rank: the routed ones, then the shared ones."""

    def __init__(self, ctx: BuildContext, width: int, routed: int, shared: int, inner: int) -> None:
        super().__init__()
        self.shared = shared
        self.gate_up = ctx.weight(routed + shared, 2 * inner, width)
        self.down = ctx.weight(routed + shared, width, inner)
        self._experts = ctx.op("experts", E=routed + shared, D=width, I=inner)

    def forward(self, x_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor) -> Tensor:
        return self._experts(x_TD, weights_Tk, ids_Tk, self.gate_up, self.down, self.shared)


class Fp8Experts(nn.Module):
    """Experts whose weights are float8_e4m3fn, one float32 scale a block; gate and up have blocks of their own."""

    def __init__(self, ctx: BuildContext, width: int, routed: int, shared: int, inner: int) -> None:
        super().__init__()
        total, fp8, f32 = routed + shared, torch.float8_e4m3fn, torch.float32
        self.shared = shared
        self.gate_up = ctx.weight(total, 2 * inner, width, dtype=fp8)
        self.gate_up_scale = ctx.weight(total, 2 * blocks(inner), blocks(width), dtype=f32)
        self.down = ctx.weight(total, width, inner, dtype=fp8)
        self.down_scale = ctx.weight(total, blocks(width), blocks(inner), dtype=f32)
        self._experts = ctx.op("experts_fp8", E=total, D=width, I=inner)

    def forward(self, x_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor) -> Tensor:
        gate_up, down = (self.gate_up, self.gate_up_scale), (self.down, self.down_scale)
        return self._experts(x_TD, weights_Tk, ids_Tk, *gate_up, *down, self.shared)


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
        self.mesh = ctx.mesh
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

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.mesh.all_reduce(self.experts(x_TD, *self.router(x_TD)))
