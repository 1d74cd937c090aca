"""Feed-forward blocks, norm and residual included: dense SwiGLU, and a mixture of SwiGLU experts with shared ones."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from thalweg.layers.context import BuildContext
from thalweg.layers.expert_exchange import ExpertExchange
from thalweg.layers.linear import GateUp, Linear, LinearAdd, Weights
from thalweg.layers.norm import NormWeight
from thalweg.ops.activation import SILU_AND_MUL, SiluAndMulDims
from thalweg.ops.all_reduce import ALL_REDUCE_ADD, AllReduceAdd, AllReduceAddDims
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims, Finish
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims, Scoring
from thalweg.ops.norm import NextNorm
from thalweg.ops.residual import GATED_ADD, GatedAddDims
from thalweg.parallel.mesh import Mesh
from thalweg.quant import PLAIN


class SwiGLU(nn.Module):
    """x + down(silu(gate n) * up n) with n = norm(x), its width sharded."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, eps: float) -> None:
        super().__init__()
        local = ctx.shards.count(inner, "intermediate_size")
        self.gate_up = GateUp(ctx.below("gate_up"), width, local, eps)
        self.down = LinearAdd(ctx.below("down"), local, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down(self.gate_up(x_TD), x_TD)
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

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(norm(x), weights float32, expert ids), the latter two [T, top_k + shared]; the shared experts come last,
        with weight 1 or, if `gated`, the sigmoid of what the last row of the weight gives."""
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
        self._experts = ctx.op(EXPERTS, ExpertsDims(E=total, D=width, I=inner, scheme=name, own=own))

    def _register(self, stored: dict[str, nn.Parameter]) -> tuple[str, ...]:
        for name, weight in stored.items():
            self.register_parameter(name, weight)
        return tuple(stored)

    def _stored(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """The tensors of a weight, as the op takes them."""
        return tuple(getattr(self, name) for name in names)

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
        gate_up, down = self._stored(self._gate_up), self._stored(self._down)
        return self._experts(
            normed_TD,
            weights_Tk,
            ids_Tk,
            gate_up,
            down,
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
        return self.in_proj.weight, self.down.weight


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
        self._gated_add = ctx.op(GATED_ADD, GatedAddDims(D=width))

    def forward(self, normed_TD: Tensor) -> Tensor:
        y_TD, gate_T1 = self._output_and_gate(normed_TD)
        return y_TD if gate_T1 is None else y_TD * gate_T1.sigmoid()

    def added(self, normed_TD: Tensor, x_TD: Tensor) -> Tensor:
        """x + the expert of normed."""
        return self._gated_add(x_TD, *self._output_and_gate(normed_TD))

    def _output_and_gate(self, normed_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up_T2I, gate_T1 = self.in_proj(normed_TD).split(self.split, dim=-1)
        return self.down(self._act(gate_up_T2I)), gate_T1 if self.gated else None


def _over_ranks(
    op: AllReduceAdd,
    mesh: Mesh,
    x_TD: Tensor,
    shared_TD: Tensor | None,
    parts_PD: Tensor,
    *,
    weights_Tk: Tensor | None = None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x + the sum over ranks of what their experts gave, this one's in parts, and of its shared expert."""
    own_TD = shared_TD if own_TD is None else own_TD
    return op(x_TD, parts_PD, mesh, weights_Tk=weights_Tk, own_TD=own_TD, scale=scale)


class MoE(nn.Module):
    """x plus its routed experts and the shared ones: as further experts that every token takes, with weight 1 or what
    their gate says; if the plan stores them otherwise than the routed ones, as one expert beside these where they are
    in the model's dtype and have no gate, or as an MLP of their own.

    If data-parallel ranks divide the routed experts, every rank has the shared ones, and tokens go to their routed ones
    and back (ExpertExchange); a rank without tokens then calls `serve_others`.
    """

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
        self.shared: SharedExpert | OwnExpert | None = None
        placement = ctx.placement(experts)
        self._routed = placement.here
        divided = ctx.mesh.data.size > 1
        self._reduce_add: AllReduceAdd | None = None
        if ctx.mesh.tp_size > 1:
            dims = AllReduceAddDims(D=width, ranks=ctx.mesh.tp_size, mapped=ctx.mesh.mapped)
            self._reduce_add = ctx.op(ALL_REDUCE_ADD, dims)
        self._nothing_TD = torch.empty(0, width, dtype=ctx.dtype, device=ctx.device)
        own, gated = 0, gated_shared == inner and "shared.down.weight" not in ctx
        if gated:
            shared = 1
        elif gated_shared:
            self.shared = SharedExpert(ctx.below("shared"), width, gated_shared, gated=True)
        elif shared and "shared.down.weight" in ctx:
            plain = all(ctx.planned(f"shared.{name}.weight") is None for name in ("in_proj", "down"))
            if plain and not divided:
                self.shared = OwnExpert(ctx.below("shared"), width, shared * inner)
                own = self.shared.width
            else:
                self.shared = SharedExpert(ctx.below("shared"), width, shared * inner, gated=False)
            shared = 0
        self.router = Router(
            ctx,
            width,
            experts,
            eps,
            top_k=top_k,
            renormalize=renormalize,
            # Beside an expert of its own width the others are scaled where it and the residual are added.
            scale=1.0 if own else scale,
            groups=groups,
            topk_groups=topk_groups,
            scoring=scoring,
            shared=shared,
            gated=gated,
        )
        self._exchange: ExpertExchange | None = None
        if divided:
            self._exchange = ExpertExchange(ctx, placement, width=width, top_k=top_k, shared=shared)
        local = ctx.shards.count(inner, "moe_intermediate_size")
        own_scale = scale if own else 1.0
        total = self._routed + shared
        # With an exchange only some of the tokens have shared experts behind their routed ones.
        promised = 0 if divided else shared
        self.experts = Experts(ctx.below("experts"), width, total, promised, local, own, own_scale)

    def forward(self, x_TD: Tensor, next_norm: NextNorm | None = None) -> Tensor:
        """`next_norm` is given what is known of it, as op "experts" does."""
        normed_TD, weights_Tk, ids_Tk = self.router(x_TD)
        if self._exchange is not None:
            return self._exchanged(self._exchange, x_TD, normed_TD, weights_Tk, ids_Tk)
        own = self.shared.weights if isinstance(self.shared, OwnExpert) else None
        expert = self.shared if isinstance(self.shared, SharedExpert) else None
        if self._reduce_add is None:
            added_TD = x_TD if expert is None else expert.added(normed_TD, x_TD)
            y_TD: Tensor = self.experts(normed_TD, weights_Tk, ids_Tk, added_TD, own, next_norm=next_norm)
        else:
            own_TD = None if expert is None else expert(normed_TD)
            finish = partial(_over_ranks, self._reduce_add, self.mesh, x_TD, own_TD)
            y_TD = self.experts(normed_TD, weights_Tk, ids_Tk, None, own, finish)
        return y_TD

    def serve_others(self) -> None:
        """Take part in the exchange of a step in which this rank has no tokens."""
        assert self._exchange is not None
        x_TD, k = self._nothing_TD, self.router.top_k
        ids_Tk = torch.empty(0, k, dtype=torch.int64, device=x_TD.device)
        self._exchange(x_TD, ids_Tk.float(), ids_Tk, self._run_routed)

    def expert_counts(self) -> list[int]:
        """As ExpertExchange.counts."""
        assert self._exchange is not None
        return self._exchange.counts()

    def _exchanged(
        self, exchange: ExpertExchange, x_TD: Tensor, normed_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor
    ) -> Tensor:
        k, own = self.router.top_k, self.router.shared
        # What the experts' sum is added to; if ranks share the model, which sum over theirs at last, this one's part.
        added_TD = x_TD if self._reduce_add is None else torch.zeros_like(x_TD)
        if isinstance(self.shared, SharedExpert):
            added_TD = self.shared.added(normed_TD, added_TD)
        if self.mesh.data.live_T is not None:
            gathered = exchange.dispatch(normed_TD, weights_Tk, ids_Tk)
            y_TD: Tensor = self.experts(*gathered, None, None, partial(exchange.combine, added_TD))
        else:
            if own:
                ids_S = torch.arange(self._routed, self._routed + own, device=ids_Tk.device, dtype=ids_Tk.dtype)
                ids_TS = ids_S.expand(len(ids_Tk), own).contiguous()
                added_TD = self.experts(normed_TD, weights_Tk[:, k:].contiguous(), ids_TS, added_TD, None)
            y_TD = added_TD + exchange(normed_TD, weights_Tk[:, :k], ids_Tk[:, :k], self._run_routed)
        return y_TD if self._reduce_add is None else self._reduce_add(x_TD, y_TD, self.mesh)

    def _run_routed(self, rows_PD: Tensor, ids_P: Tensor) -> Tensor:
        """Rows that each take one of this rank's routed experts."""
        ones_P1 = torch.ones(len(rows_PD), 1, device=rows_PD.device)
        y_PD: Tensor = self.experts(rows_PD, ones_P1, ids_P.unsqueeze(1), None, None)
        return y_PD
