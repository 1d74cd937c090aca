"""Expert parallelism: routed experts that are divided over data-parallel ranks. Tokens go to them and come back."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.layers.context import BuildContext
from thalweg.ops.moe.exchange import (
    EXPERT_COMBINE,
    EXPERT_DISPATCH,
    ExpertCombineDims,
    ExpertDispatchDims,
    Gathered,
)
from thalweg.parallel.placement import Placement

MOST_BYTES = 1 << 30
"""Of the experts' outputs on a rank, if all ranks' tokens take experts of that one. More tokens are exchanged in
turns."""
RunExperts = Callable[[Tensor, Tensor], Tensor]
"""(rows [P, D], their experts' places on this rank, int64 [P]) to the experts' outputs [P, D]."""


class ExpertExchange:
    """All ranks call at the same time, each with its own tokens, of which there may be none. An expert that is on
    several ranks serves the tokens of these where they are; those of other ranks go to its copies in turn."""

    def __init__(self, ctx: BuildContext, placement: Placement, *, width: int, top_k: int, shared: int) -> None:
        """Of tokens of this width, which take `top_k` of the experts, and of `shared` more, which every rank has behind
        its own."""
        ranks, device = ctx.mesh.data, ctx.device
        self._ranks, self._here, self._shared = ranks, placement.here, shared
        size, mapped, here = ranks.size, ranks.mapped, placement.here
        dims = ExpertDispatchDims(D=width, K=top_k, S=shared, here=here, ranks=size, mapped=mapped)
        self._dispatch = ctx.op(EXPERT_DISPATCH, dims)
        of_parts = ExpertCombineDims(D=width, parts=top_k + shared, ranks=size, mapped=mapped)
        self._combine = ctx.op(EXPERT_COMBINE, of_parts)
        choices = placement.choices(ranks.rank)
        self._experts, self._device = len(choices), device
        self._slots: tuple[Tensor, Tensor] | None = None  # of each expert [E, most copies], and how many they are [E]
        if choices != [[e] for e in range(len(choices))]:
            most = max(map(len, choices))
            table = torch.tensor([(numbers * most)[:most] for numbers in choices], device=device)
            self._slots = table, torch.tensor([len(numbers) for numbers in choices], device=device)
        self._counted_E: Tensor | None = None  # nobody asked yet

    def __call__(self, x_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor, run: RunExperts) -> Tensor:
        """y_TD in x's dtype, the weighted sum over each token's k experts, wherever they are. `run` is called if any
        rank has rows for this one. The sum is in fp32 and in the order of the ids, whatever the number of ranks."""
        most = self._most(x_TD, ids_Tk)
        outputs, left = [], True
        while left:
            y_TD, left = self._exchange(x_TD[:most], weights_Tk[:most], ids_Tk[:most], len(x_TD) > most, run)
            outputs.append(y_TD)
            x_TD, weights_Tk, ids_Tk = x_TD[most:], weights_Tk[most:], ids_Tk[most:]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _exchange(
        self, x_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor, more: bool, run: RunExperts
    ) -> tuple[Tensor, bool]:
        """The same of some tokens, and whether any rank has `more`."""
        ranks, here, (T, k) = self._ranks, self._here, ids_Tk.shape
        if self._counted_E is not None:
            self._counted_E += ids_Tk.flatten().bincount(minlength=self._experts)
        ids_P = self._slots_of(ids_Tk).flatten()
        order_P = ids_P.argsort(stable=True)  # by slot, and so by rank
        counts_RE = ids_P.bincount(minlength=ranks.size * here).view(ranks.size, here)
        theirs_RE, more_R = ranks.exchange(F.pad(counts_RE, (0, 1), value=int(more))).split([here, 1], 1)
        # The host has to know how many rows come and go, which it waits for.
        sent, received, left = torch.stack([counts_RE.sum(1), theirs_RE.sum(1), more_R[:, 0]]).tolist()
        rows_QD = ranks.all_to_all(x_TD[order_P // k], sent, received)
        experts_RE = torch.arange(here, device=ids_P.device).repeat(ranks.size)
        if len(rows_QD):
            rows_QD = run(rows_QD, experts_RE.repeat_interleave(theirs_RE.flatten(), output_size=len(rows_QD)))
        sorted_PD = ranks.all_to_all(rows_QD, received, sent)
        y_PD = torch.empty_like(sorted_PD, dtype=torch.float32)
        y_PD[order_P] = sorted_PD.float()
        # In place: of a long prompt these are gigabytes.
        y_TD = y_PD.view(T, k, y_PD.shape[1]).mul_(weights_Tk.unsqueeze(-1)).sum(1).to(x_TD.dtype)
        return y_TD, any(left)

    def turns(self, x_TD: Tensor, ids_Tk: Tensor) -> list[slice]:
        """Which rows are exchanged together, in the steps that ranks pad."""
        assert self._ranks.live_R is not None
        most = self._most(x_TD, ids_Tk)
        return [slice(start, start + most) for start in range(0, len(self._ranks.live_R), most)]

    def dispatch(self, turn: slice, x_TD: Tensor, weights_Tk: Tensor, ids_Tk: Tensor) -> Gathered:
        """Tokens of all ranks in a turn, of which this rank's are given, padded to as many of each, and which of this
        rank's experts they take. With `combine` the same as a call, but that the shared experts are among a token's,
        nothing waits for the device, and each rank's part of a token's sum is rounded. Only while the ranks run a
        padded step (DataRanks.padded)."""
        live_R, routed = self._ranks.live_R, ids_Tk.shape[1] - self._shared
        assert live_R is not None
        if self._counted_E is not None:
            counted_P = ids_Tk[:, :routed].flatten()
            self._counted_E.scatter_add_(0, counted_P, torch.ones_like(counted_P))
        slots_Tk = ids_Tk
        if self._slots is not None:
            slots_Tk = torch.cat([self._slots_of(ids_Tk[:, :routed]), ids_Tk[:, routed:]], 1)
        tokens = x_TD, weights_Tk, slots_Tk
        return self._dispatch(live_R[turn], *tokens, self._ranks, here=self._here, shared=self._shared)

    def combine(
        self,
        turn: slice,
        residual_TD: Tensor,
        parts_PD: Tensor,
        *,
        weights_Tk: Tensor | None = None,
        own_TD: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The residual of this rank's tokens plus what all ranks' experts gave for them, and their own expert (fp32); a
        `Finish` of the experts of what `dispatch` gave."""
        live_R = self._ranks.live_R
        assert live_R is not None
        return self._combine(live_R[turn], residual_TD, parts_PD, self._ranks, weights_Ak=weights_Tk, own_TD=own_TD)

    def _most(self, x_TD: Tensor, ids_Tk: Tensor) -> int:
        """Tokens of each rank in a turn."""
        row_bytes = ids_Tk.shape[1] * x_TD.shape[1] * x_TD.element_size()
        return max(1, MOST_BYTES // (self._ranks.size * row_bytes))

    def _slots_of(self, ids_Tk: Tensor) -> Tensor:
        """The slot, over all ranks, of each pair's expert."""
        if self._slots is None:
            return ids_Tk
        table, copies = self._slots
        first = self._ranks.rank
        turns_T1 = torch.arange(first, first + len(ids_Tk), device=ids_Tk.device).unsqueeze(1)
        slots_Tk: Tensor = table[ids_Tk, turns_T1 % copies[ids_Tk]]
        return slots_Tk

    def counts(self) -> list[int]:
        """How many of this rank's tokens each routed expert of the model got since this was first asked, from any
        thread. Waits for the device."""
        if self._counted_E is None:
            self._counted_E = torch.zeros(self._experts, dtype=torch.int64, device=self._device)
        counts: list[int] = self._counted_E.tolist()
        return counts
