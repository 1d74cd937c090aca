"""Feed-forward blocks: dense SwiGLU, and a mixture of SwiGLU experts with a shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.layers.context import BuildContext
from thalweg.layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), width sharded; returns this rank's part of the sum unless `reduce`."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, what: str, *, reduce: bool = True) -> None:
        super().__init__()
        local = ctx.shard(inner, what)
        self.mesh, self.reduce = ctx.mesh, reduce
        self.gate_up = Linear(ctx, width, 2 * local)
        self.down = Linear(ctx, local, width)
        self._act = ctx.op("silu_and_mul", I=local)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.down(self._act(self.gate_up(x_TD)))
        return self.mesh.all_reduce(y_TD) if self.reduce else y_TD


class Router(nn.Module):
    """Sigmoid scores; the bias steers the choice only (auxiliary-loss-free balancing, arXiv:2408.15664)."""

    def __init__(
        self, ctx: BuildContext, width: int, experts: int, *, top_k: int, renormalize: bool, scale: float, groups: int, topk_groups: int
    ) -> None:
        super().__init__()
        self.weight = ctx.weight(experts, width)
        self.bias = ctx.weight(experts, dtype=torch.float32)
        self.options = (top_k, renormalize, scale, "sigmoid", groups, topk_groups)
        self._route = ctx.op("route", E=experts, K=top_k)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(weights float32 [T, k], expert ids int64 [T, k]). Scores in float32: rounding them would flip choices."""
        return self._route(F.linear(x_TD.float(), self.weight.float()), self.bias, *self.options)


class Experts(nn.Module):
    def __init__(self, ctx: BuildContext, width: int, experts: int, inner: int) -> None:
        super().__init__()
        self.gate_up = ctx.weight(experts, 2 * inner, width)
        self.down = ctx.weight(experts, width, inner)
        self._experts = ctx.op("experts", E=experts, D=width, I=inner)

    def forward(self, x_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor) -> Tensor:
        return self._experts(x_TD, weights_Tk, ids_Tk, self.gate_up, self.down)


class MoE(nn.Module):
    """Routed experts plus the shared expert, whose width every rank holds a slice of; one reduction for both."""

    def __init__(
        self, ctx: BuildContext, *, width: int, experts: int, inner: int, shared_inner: int, top_k: int, renormalize: bool, scale: float, groups: int, topk_groups: int
    ) -> None:
        super().__init__()
        self.mesh = ctx.mesh
        self.router = Router(ctx, width, experts, top_k=top_k, renormalize=renormalize, scale=scale, groups=groups, topk_groups=topk_groups)
        self.experts = Experts(ctx, width, experts, ctx.shard(inner, "moe_intermediate_size"))
        self.shared = SwiGLU(ctx, width, shared_inner, "moe_intermediate_size * num_shared_experts", reduce=False) if shared_inner else None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.experts(x_TD, *self.router(x_TD))
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return self.mesh.all_reduce(y_TD)
