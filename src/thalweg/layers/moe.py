"""Feed-forward blocks, norm and residual included: dense SwiGLU, and a mixture of SwiGLU experts with shared ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from thalweg.layers.context import BuildContext
from thalweg.layers.expert_exchange import ExpertExchange
from thalweg.layers.experts import Experts, OwnExpert, Router, SharedExpert
from thalweg.layers.linear import GateUp, LinearAdd
from thalweg.ops.all_reduce import ALL_REDUCE_ADD, AllReduceAdd, AllReduceAddDims
from thalweg.ops.moe.experts import EXPERTS
from thalweg.ops.moe.gathered import GATHERED_EXPERTS, GatheredExperts
from thalweg.ops.moe.gathered import refusal as why_not_gathered
from thalweg.ops.moe.routed import ROUTED_EXPERTS, RoutedExperts, RoutedExpertsDims, refusal
from thalweg.ops.moe.router import NORM_ROUTER, Scoring
from thalweg.ops.norm import NextNorm
from thalweg.parallel.mesh import Mesh


class SwiGLU(nn.Module):
    """x + down(silu(gate n) * up n) with n = norm(x), its width sharded."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, eps: float) -> None:
        super().__init__()
        local = ctx.shards.count(inner, "intermediate_size")
        self.gate_up = GateUp(ctx.below("gate_up"), width, local, eps)
        self.down = LinearAdd(ctx.below("down"), local, width)

    def forward(self, x_TD: Tensor, next_norm: NextNorm | None = None) -> Tensor:
        """`next_norm` is told what is known of it."""
        y_TD: Tensor = self.down(self.gate_up(x_TD), x_TD, next_norm)
        return y_TD


def _over_ranks(
    op: AllReduceAdd,
    mesh: Mesh,
    x_TD: Tensor,
    shared_TD: Tensor | None,
    next_norm: NextNorm | None,
    parts_PD: Tensor,
    *,
    weights_Tk: Tensor | None = None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x + the sum over ranks of what their experts gave, this one's in parts, and of its shared expert."""
    own_TD = shared_TD if own_TD is None else own_TD
    return op(x_TD, parts_PD, mesh, weights_Tk=weights_Tk, own_TD=own_TD, scale=scale, next_norm=next_norm)


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
        self._gathered: GatheredExperts | None = None
        if divided and isinstance(self.shared, SharedExpert) and self.shared.weights is not None:
            gathered = replace(self.experts.dims, own=self.shared.width)
            if why_not_gathered(ctx.where, gathered) is None and not ctx.resolver.prefers(EXPERTS.name):
                self._gathered = ctx.op(GATHERED_EXPERTS, gathered)
        self._together: RoutedExperts | None = None
        whole = self._exchange is None and self._reduce_add is None and not isinstance(self.shared, SharedExpert)
        # Whoever asks for one of them by name is to have it.
        if whole and not any(ctx.resolver.prefers(op.name) for op in (NORM_ROUTER, EXPERTS)):
            together = RoutedExpertsDims(
                experts=self.experts.dims,
                K=top_k,
                G=groups,
                S=shared,
                scoring=scoring,
                renormalize=renormalize,
                gated=gated,
                norm_fp32=ctx.norm_fp32,
            )
            if refusal(ctx.where, together) is None:
                self._together = ctx.op(ROUTED_EXPERTS, together)

    def own_norm(self) -> NextNorm | None:
        """For whoever makes this block's input, and may compute its norm as well; None if that would be of no use."""
        if self._reduce_add is None:
            return None
        return NextNorm(self.router.norm.weight, self.router.norm.eps)

    def forward(self, x_TD: Tensor, next_norm: NextNorm | None = None, known_TD: Tensor | None = None) -> Tensor:
        """`next_norm` is told what is known of it, as op "experts" does. `known_TD`: norm(x), if it is known."""
        if self._together is None:
            return self._apart(x_TD, next_norm, known_TD)
        router, experts = self.router, self.experts
        return self._together(
            x_TD,
            partial(self._apart, next_norm=next_norm),
            router.norm.weight,
            router.norm.eps,
            router.weight,
            router.bias,
            *experts.weights,
            router_scale=router.scale,
            own=self._own,
            scale=experts.scale,
            next_norm=next_norm,
        )

    @property
    def _own(self) -> tuple[Tensor, Tensor] | None:
        return self.shared.weights if isinstance(self.shared, OwnExpert) else None

    def _apart(self, x_TD: Tensor, next_norm: NextNorm | None, known_TD: Tensor | None = None) -> Tensor:
        """By the router's op and then the experts'."""
        normed_TD, weights_Tk, ids_Tk = self.router(x_TD, known_TD)
        if self._exchange is not None:
            return self._exchanged(self._exchange, x_TD, normed_TD, weights_Tk, ids_Tk, next_norm)
        own = self._own
        expert = self.shared if isinstance(self.shared, SharedExpert) else None
        if self._reduce_add is None:
            added_TD = x_TD if expert is None else expert.added(normed_TD, x_TD)
            y_TD: Tensor = self.experts(normed_TD, weights_Tk, ids_Tk, added_TD, own, next_norm=next_norm)
        else:
            own_TD = None if expert is None else expert(normed_TD)
            finish = partial(_over_ranks, self._reduce_add, self.mesh, x_TD, own_TD, next_norm)
            y_TD = self.experts(normed_TD, weights_Tk, ids_Tk, None, own, finish)
        return y_TD

    def serve_others(self) -> None:
        """Take part in the exchange of a step in which this rank has no tokens."""
        assert self._exchange is not None
        x_TD, k = self._nothing_TD, self.router.top_k
        padded = self.mesh.data.live_R is not None
        ids_Tk = torch.empty(0, k + self.router.shared * padded, dtype=torch.int64, device=x_TD.device)
        if padded:
            self._padded(self._exchange, x_TD, x_TD, ids_Tk.float(), ids_Tk)
        else:
            self._exchange(x_TD, ids_Tk.float(), ids_Tk, self._run_routed)

    def expert_counts(self) -> list[int]:
        """As ExpertExchange.counts."""
        assert self._exchange is not None
        return self._exchange.counts()

    def _exchanged(
        self,
        exchange: ExpertExchange,
        x_TD: Tensor,
        normed_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        next_norm: NextNorm | None,
    ) -> Tensor:
        k, own = self.router.top_k, self.router.shared
        # What the experts' sum is added to; if ranks share the model, which sum over theirs at last, this one's part.
        added_TD = x_TD if self._reduce_add is None else torch.zeros_like(x_TD)
        if self.mesh.data.live_R is not None:
            y_TD = self._padded(exchange, added_TD, normed_TD, weights_Tk, ids_Tk)
        else:
            added_TD = self._with_shared(normed_TD, added_TD)
            if own:
                ids_S = torch.arange(self._routed, self._routed + own, device=ids_Tk.device, dtype=ids_Tk.dtype)
                ids_TS = ids_S.expand(len(ids_Tk), own).contiguous()
                added_TD = self.experts(normed_TD, weights_Tk[:, k:].contiguous(), ids_TS, added_TD, None)
            y_TD = added_TD + exchange(normed_TD, weights_Tk[:, :k], ids_Tk[:, :k], self._run_routed)
        return y_TD if self._reduce_add is None else self._reduce_add(x_TD, y_TD, self.mesh, next_norm=next_norm)

    def _padded(
        self, exchange: ExpertExchange, added_TD: Tensor, normed_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor
    ) -> Tensor:
        """Of a step in which all ranks have as many rows."""
        tokens = added_TD, normed_TD, weights_Tk, ids_Tk
        turns = exchange.turns(normed_TD, ids_Tk)
        outputs = [self._in_turn(exchange, turn, *(t[turn] for t in tokens)) for turn in turns]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _in_turn(
        self,
        exchange: ExpertExchange,
        turn: slice,
        added_TD: Tensor,
        normed_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
    ) -> Tensor:
        """The shared expert is behind what brings the others' rows: its weights are on their way while that waits."""
        gathered = exchange.dispatch(turn, normed_TD, weights_Tk, ids_Tk)

        def apart() -> Tensor:
            finish = partial(exchange.combine, turn, self._with_shared(normed_TD, added_TD))
            y_TD: Tensor = self.experts(*gathered, None, None, finish)
            return y_TD

        if self._gathered is None:
            return apart()
        assert isinstance(self.shared, SharedExpert)
        assert self.shared.weights is not None
        ranks = self.mesh.data
        return self._gathered(
            gathered.x_AD,
            apart,
            gathered.weights_Ak,
            gathered.ids_Ak,
            *self.experts.weights,
            self.shared.weights,
            partial(exchange.combine, turn, added_TD),
            own_rows=(ranks.rank * len(gathered.x_AD) // ranks.size, len(normed_TD)),
        )

    def _with_shared(self, normed_TD: Tensor, x_TD: Tensor) -> Tensor:
        return self.shared.added(normed_TD, x_TD) if isinstance(self.shared, SharedExpert) and len(x_TD) else x_TD

    def _run_routed(self, rows_PD: Tensor, ids_P: Tensor) -> Tensor:
        """Rows that each take one of this rank's routed experts."""
        ones_P1 = torch.ones(len(rows_PD), 1, device=rows_PD.device)
        y_PD: Tensor = self.experts(rows_PD, ones_P1, ids_P.unsqueeze(1), None, None)
        return y_PD
