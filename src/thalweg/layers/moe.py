"""Feed-forward blocks, norm and residual included: dense SwiGLU, and a mixture of SwiGLU experts with shared ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.layers.context import BuildContext
from thalweg.layers.linear import Linear, LinearAdd, NormLinear
from thalweg.layers.norm import NormWeight
from thalweg.ops.activation import SILU_AND_MUL, SiluAndMulDims
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims, Scoring
from thalweg.ops.residual import SCALED_RESIDUAL_ADD, ScaledResidualAddDims
from thalweg.quant import PLAIN


class SwiGLU(nn.Module):
    """x + down(silu(gate n) * up n) with n = norm(x), its width sharded."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, eps: float) -> None:
        super().__init__()
        local = ctx.shards.count(inner, "intermediate_size")
        self.gate_up = NormLinear(ctx.below("gate_up"), width, [local, local], eps)
        self.down = LinearAdd(ctx.below("down"), local, width)
        self._act = ctx.op(SILU_AND_MUL, SiluAndMulDims(I=local))

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down(self._act(self.gate_up(x_TD)), x_TD)
        return y_TD


class Router(nn.Module):
    """Scores of experts and the choice of top_k: sigmoids, with a bias that steers the choice only (auxiliary-loss-free
    balancing, arXiv:2408.15664), or a softmax without one."""

    def __init__(
        self,
        ctx: BuildContext,
        width: int,
        experts: int,
        eps: float,
        *,
        top_k: int,
        renormalize: bool,
        scale: float,
        groups: int,
        topk_groups: int,
        scoring: Scoring,
        shared: int,
    ) -> None:
        super().__init__()
        self.norm = NormWeight(ctx, width, eps)
        self.weight = ctx.weight(experts, width)
        if scoring == "sigmoid":
            self.bias = ctx.weight(experts, dtype=torch.float32)
        else:
            self.register_buffer("bias", torch.zeros(experts, device=ctx.device))
        self.scoring = scoring
        self.top_k, self.renormalize, self.scale = top_k, renormalize, scale
        self.groups, self.topk_groups, self.shared = groups, topk_groups, shared
        dims = NormRouterDims(E=experts, D=width, K=top_k, G=groups, S=shared, norm_fp32=ctx.norm_fp32)
        self._router = ctx.op(NORM_ROUTER, dims)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(norm(x), weights float32, expert ids), the latter two [T, top_k + shared]; the shared experts come last,
        with weight 1."""
        return self._router(
            x_TD,
            self.norm.weight,
            self.norm.eps,
            self.weight,
            self.bias,
            top_k=self.top_k,
            renormalize=self.renormalize,
            scale=self.scale,
            scoring=self.scoring,
            n_group=self.groups,
            topk_group=self.topk_groups,
            num_shared=self.shared,
        )


class Experts(nn.Module):
    """Weights of all experts, each `inner` wide on this rank, stored as the plan says: the routed ones, then the
    shared ones."""

    def __init__(self, ctx: BuildContext, width: int, routed: int, shared: int, inner: int) -> None:
        super().__init__()
        self.shared, self.mesh = shared, ctx.mesh
        total = routed + shared
        self._gate_up = self._register(ctx.stored("gate_up", (total, 2 * inner, width)))
        self._down = self._register(ctx.stored("down", (total, width, inner)))
        schemes = [PLAIN if target is None else target.scheme for target in map(ctx.planned, ("gate_up", "down"))]
        name = " | ".join(dict.fromkeys(scheme.name for scheme in schemes))
        self._experts = ctx.op(EXPERTS, ExpertsDims(E=total, D=width, I=inner, scheme=name))

    def _register(self, stored: dict[str, nn.Parameter]) -> tuple[str, ...]:
        for name, weight in stored.items():
            self.register_parameter(name, weight)
        return tuple(stored)

    def _stored(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """The tensors of a weight, as the op takes them."""
        return tuple(getattr(self, name) for name in names)

    def forward(self, normed_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor, residual_TD: Tensor | None) -> Tensor:
        """The experts' sum over this rank's width, plus the residual if there is one."""
        gate_up, down = self._stored(self._gate_up), self._stored(self._down)
        return self._experts(
            normed_TD, weights_Tk, ids_Tk, gate_up, down, residual_TD=residual_TD, num_shared=self.shared
        )


class SharedExpert(nn.Module):
    """down(silu(gate n) * up n), its width sharded: an expert that every token takes. If `gated` it has a gate g, and
    its output is multiplied with sigmoid(g n)."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, *, gated: bool) -> None:
        super().__init__()
        local = ctx.shards.count(inner, "shared_expert_intermediate_size" if gated else "moe_intermediate_size")
        self.split = [2 * local, int(gated)]
        self.gated = gated
        self.in_proj = Linear(ctx.below("in_proj"), width, sum(self.split))
        self.down = Linear(ctx.below("down"), local, width)
        self._act = ctx.op(SILU_AND_MUL, SiluAndMulDims(I=local))

    def forward(self, normed_TD: Tensor) -> Tensor:
        gate_up_T2I, gate_T1 = self.in_proj(normed_TD).split(self.split, dim=-1)
        y_TD: Tensor = self.down(self._act(gate_up_T2I))
        return y_TD * gate_T1.sigmoid() if self.gated else y_TD


class MoE(nn.Module):
    """x plus its routed experts and the shared ones: as further experts that every token takes with weight 1, or as an
    MLP of their own, if they have a gate or the plan stores them otherwise than the routed ones."""

    def __init__(
        self,
        ctx: BuildContext,
        *,
        width: int,
        eps: float,
        experts: int,
        inner: int,
        shared: int,
        top_k: int,
        renormalize: bool,
        scale: float,
        groups: int,
        topk_groups: int,
        scoring: Scoring,
        gated_shared: int,
    ) -> None:
        super().__init__()
        self.mesh = ctx.mesh
        own_mlp = gated_shared
        if shared and "shared.down.weight" in ctx:
            shared, own_mlp = 0, shared * inner
        # On one rank, what the routed experts give is scaled where the MLP's output and the residual are added.
        self._add, self.scale = None, scale
        if own_mlp and not gated_shared and self.mesh.tp_size == 1:
            self._add, scale = ctx.op(SCALED_RESIDUAL_ADD, ScaledResidualAddDims(D=width)), 1.0
        self.router = Router(
            ctx,
            width,
            experts,
            eps,
            top_k=top_k,
            renormalize=renormalize,
            scale=scale,
            groups=groups,
            topk_groups=topk_groups,
            scoring=scoring,
            shared=shared,
        )
        local = ctx.shards.count(inner, "moe_intermediate_size")
        self.experts = Experts(ctx.below("experts"), width, experts, shared, local)
        self.shared = None
        if own_mlp:
            self.shared = SharedExpert(ctx.below("shared"), width, own_mlp, gated=bool(gated_shared))

    def forward(self, x_TD: Tensor) -> Tensor:
        normed_TD, weights_Tk, ids_Tk = self.router(x_TD)
        one_rank = self.mesh.tp_size == 1
        added_TD = x_TD if one_rank else None
        if self.shared is not None:
            own_TD = self.shared(normed_TD)
            if self._add is not None:
                return self._add(x_TD, own_TD, self.experts(normed_TD, weights_Tk, ids_Tk, None), self.scale)
            added_TD = own_TD if added_TD is None else added_TD + own_TD
        y_TD: Tensor = self.experts(normed_TD, weights_Tk, ids_Tk, added_TD)
        return y_TD if one_rank else x_TD + self.mesh.all_reduce(y_TD)
