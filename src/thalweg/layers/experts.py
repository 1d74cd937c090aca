"""Parts of a mixture of SwiGLU experts: the router, the experts' weights, and shared experts beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.layers.context import BuildContext
from thalweg.layers.linear import Linear, Weights
from thalweg.layers.norm import NormWeight
from thalweg.ops.activation import SILU_AND_MUL, SiluAndMulDims
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims, Finish
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims, Scoring
from thalweg.ops.norm import NextNorm
from thalweg.ops.residual import GATED_ADD, GatedAddDims
from thalweg.quant import PLAIN


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
        gated: bool,
    ) -> None:
        super().__init__()
        self.norm = NormWeight(ctx, width, eps)
        self.weight = ctx.weight(experts + int(gated), width)
        if scoring == "sigmoid":
            self.bias = ctx.weight(experts, dtype=torch.float32)
        else:
            self.register_buffer("bias", torch.zeros(experts, device=ctx.device))
        self.scoring = scoring
        self.top_k, self.renormalize, self.scale = top_k, renormalize, scale
        self.groups, self.topk_groups, self.shared = groups, topk_groups, shared
        dims = NormRouterDims(E=experts, D=width, K=top_k, G=groups, S=shared, gated=gated, norm_fp32=ctx.norm_fp32)
        self._router = ctx.op(NORM_ROUTER, dims)

    def forward(self, x_TD: Tensor, known_TD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(norm(x), weights float32, expert ids), the latter two [T, top_k + shared]; the shared experts come last,
        with weight 1 or, if `gated`, the sigmoid of what the last row of the weight gives. `known_TD`: norm(x), if it
        is known."""
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
            known_TD=known_TD,
        )


class Experts(nn.Module):
    """Weights of this rank's experts, each `inner` wide on it, stored as the plan says: the routed ones, then the
    shared ones. Beside them may stand one of its own width and weights that every token takes, `own`."""

    def __init__(
        self, ctx: BuildContext, width: int, total: int, shared: int, inner: int, own: int, scale: float
    ) -> None:
        """`total` experts, of which every token takes the last `shared`."""
        super().__init__()
        self.shared, self.scale = shared, scale
        self._gate_up = self._register(ctx.stored("gate_up", (total, 2 * inner, width)))
        self._down = self._register(ctx.stored("down", (total, width, inner)))
        schemes = [PLAIN if target is None else target.scheme for target in map(ctx.planned, ("gate_up", "down"))]
        name = " | ".join(dict.fromkeys(scheme.name for scheme in schemes))
        self.dims = ExpertsDims(E=total, D=width, I=inner, scheme=name, own=own)
        self._experts = ctx.op(EXPERTS, self.dims)

    def _register(self, stored: dict[str, nn.Parameter]) -> tuple[str, ...]:
        for name, weight in stored.items():
            self.register_parameter(name, weight)
        return tuple(stored)

    @property
    def weights(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Tensors of gate and up, and of down, as the op takes them."""
        gate_up, down = (tuple(getattr(self, name) for name in names) for names in (self._gate_up, self._down))
        return gate_up, down

    def forward(
        self,
        normed_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        residual_TD: Tensor | None,
        own: tuple[Tensor, Tensor] | None,
        finish: Finish | None = None,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        """The experts' sum over this rank's width, plus the residual if there is one, or what `finish` makes of it."""
        return self._experts(
            normed_TD,
            weights_Tk,
            ids_Tk,
            *self.weights,
            residual_TD=residual_TD,
            num_shared=self.shared,
            own=own,
            scale=self.scale,
            finish=finish,
            next_norm=next_norm,
        )


class OwnExpert(nn.Module):
    """Weights of an expert that every token takes, in the model's dtype, its width sharded: gate above up, and down."""

    def __init__(self, ctx: BuildContext, width: int, inner: int) -> None:
        super().__init__()
        self.width = ctx.shards.count(inner, "moe_intermediate_size")
        self.in_proj = Weights(ctx.below("in_proj"), width, 2 * self.width)
        self.down = Weights(ctx.below("down"), self.width, width)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Gate above up [2 * width, D], and down [D, width], as op "experts" takes them in `own`."""
        return self.in_proj.weight, self.down.weight


class SharedExpert(nn.Module):
    """down(silu(gate n) * up n), its width sharded: an expert that every token takes. If `gated` it has a gate g, and
    its output is multiplied with sigmoid(g n)."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, *, gated: bool) -> None:
        super().__init__()
        local = ctx.shards.count(inner, "shared_expert_intermediate_size" if gated else "moe_intermediate_size")
        self.split = [2 * local, int(gated)]
        self.gated, self.width = gated, local
        self.in_proj = Linear(ctx.below("in_proj"), width, sum(self.split))
        self.down = Linear(ctx.below("down"), local, width)
        self._act = ctx.op(SILU_AND_MUL, SiluAndMulDims(I=local))
        self._gated_add = ctx.op(GATED_ADD, GatedAddDims(D=width))

    @property
    def weights(self) -> tuple[Tensor, Tensor] | None:
        """As those of an OwnExpert; None if it is quantized or has a gate."""
        if self.gated or self.in_proj.is_quantized or self.down.is_quantized:
            return None
        return self.in_proj.weight, self.down.weight

    def forward(self, normed_TD: Tensor) -> Tensor:
        y_TD, gate_T1 = self._output_and_gate(normed_TD)
        return y_TD if gate_T1 is None else y_TD * gate_T1.sigmoid()

    def added(self, normed_TD: Tensor, x_TD: Tensor) -> Tensor:
        """x + the expert of normed."""
        return self._gated_add(x_TD, *self._output_and_gate(normed_TD))

    def _output_and_gate(self, normed_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up_T2I, gate_T1 = self.in_proj(normed_TD).split(self.split, dim=-1)
        return self.down(self._act(gate_up_T2I)), gate_T1 if self.gated else None
