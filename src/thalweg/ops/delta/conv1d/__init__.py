"""Ops "conv1d_decode" and "conv1d_prefill": causal depthwise convolution with SiLU and a rolling state.

weight_CW [C, W + 1] has one row of taps per channel; the last tap multiplies the current input, the one
before it the previous input, and so on (a checkpoint's [C, 1, W + 1] squeezed). state_NWC [N, W, C] holds
the last W raw inputs of every slot, oldest first; a new sequence starts from zeros. Sums and SiLU are in
fp32, y has x's dtype. slots_B is int64 [B]. Slots that are not named stay bit-identical. A slot named twice
in one call (padding rows share a sink slot) ends with any one of the rows written to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from thalweg.ops.delta.conv1d import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain.triton_support import why_not

PIECE = 16  # tokens of a sequence that a program of the kernel takes


class Conv1dDecode(Protocol):
    def __call__(self, x_BC: Tensor, state_NWC: Tensor, slots_B: Tensor, weight_CW: Tensor, /) -> Tensor:
        """y_BC for one new token x_BC of each sequence; the state of its slot moves on by one, in place."""


class Conv1dPrefill(Protocol):
    def __call__(
        self, x_TC: Tensor, state_NWC: Tensor, slots_B: Tensor, offsets: Sequence[int], weight_CW: Tensor, /
    ) -> Tensor:
        """y_TC for sequences of any length: sequence b owns tokens offsets[b]:offsets[b + 1].

        The state of its slot is read first and moves on by its length, in place: a sequence shorter than W
        shifts it, one of length 0 leaves it bit-identical.
        """


def _triton_prefill(
    x_TC: Tensor, state_NWC: Tensor, slots_B: Tensor, offsets: Sequence[int], weight_CW: Tensor
) -> Tensor:
    from thalweg.ops.delta.conv1d import triton

    return triton.conv1d_prefill(x_TC, state_NWC, slots_B, offsets, weight_CW)


def _prefill_refuses(ctx: OpContext) -> str | None:
    W = ctx.dims.get("W", 0)
    if W > PIECE:  # a piece that is not the sequence's first would reach back to the state, which that one moves on
        return f"needs a convolution that remembers at most {PIECE} inputs, not {W}"
    return why_not(ctx)


_decode: Conv1dDecode = reference.conv1d_decode
_prefill: Conv1dPrefill = reference.conv1d_prefill
_kernel_prefill: Conv1dPrefill = _triton_prefill
register("conv1d_decode", "reference", _decode)
register("conv1d_prefill", "reference", _prefill)
register("conv1d_prefill", "triton", _kernel_prefill, supports=_prefill_refuses, priority=10)
