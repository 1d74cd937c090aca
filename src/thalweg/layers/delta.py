"""What the mixers of gated delta rules share: one convolution, and rows that decode apart from prompts."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from thalweg.layers.batch import Batch
from thalweg.layers.context import BuildContext, LayerCache
from thalweg.layers.linear import LinearAdd, NormLinear
from thalweg.ops.norm import NextNorm, Normed


class ShortConv(nn.Module):
    """The depthwise convolutions of q, k and v as one over all their channels [channels, taps]."""

    def __init__(self, ctx: BuildContext, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = ctx.weight(channels, taps)


class DeltaMixer(nn.Module):
    """x_TD -> x + out_proj(mixed(in_proj(norm(x)))) over this rank's heads."""

    in_proj: NormLinear
    out_proj: LinearAdd
    adds_decodes = False

    def forward(
        self,
        x_TD: Tensor,
        batch: Batch,
        cache: LayerCache,
        normed: Normed | None = None,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        proj_TX = self.in_proj(x_TD, normed)
        n, parts = batch.num_decodes, []
        if n and self.adds_decodes:
            y_BD = self._decode_add(proj_TX[:n], x_TD[:n], batch.slots_B[:n], cache)
            if n == len(x_TD):
                return y_BD
            x_TD[:n].copy_(y_BD)
            rows_TD = x_TD[n:]
            o_TO = self._mix_prefill(proj_TX[n:], batch.slots_B[n:], batch, cache)
            rows_TD.copy_(self.out_proj(o_TO, rows_TD))
            return x_TD
        if n:
            parts.append(self._mix_decode(proj_TX[:n], batch.slots_B[:n], cache))
        if n < proj_TX.shape[0]:
            parts.append(self._mix_prefill(proj_TX[n:], batch.slots_B[n:], batch, cache))
        return self.out_proj.of_parts(parts, x_TD, next_norm)

    def _decode_add(self, proj_BX: Tensor, x_BD: Tensor, slots_B: Tensor, cache: LayerCache) -> Tensor:
        """x + out_proj of `_mix_decode`, if `adds_decodes` says that one op has both."""
        raise NotImplementedError

    @abstractmethod
    def _mix_decode(self, proj_BX: Tensor, slots_B: Tensor, cache: LayerCache) -> Tensor:
        """One token of each sequence, in the slots slots_B int64, to its heads' outputs side by side [B, H*V]."""

    @abstractmethod
    def _mix_prefill(self, proj_TX: Tensor, slots_B: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Tokens of the sequences in slots_B, of which sequence i has `batch.prefill_offsets`[i] .. [i + 1], to
        [T, H*V]; states go to `batch.boundaries` besides."""
