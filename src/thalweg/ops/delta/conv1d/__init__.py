"""Op "conv1d_prefill": causal depthwise convolution with SiLU and a rolling state; `reference.conv1d_decode` is the
same for one token of each sequence, as op "kda_mixer_decode" has it.

weight_CW [C, W + 1] has one row of taps per channel; the last tap multiplies the current input, the one
before it the previous input, and so on (a checkpoint's [C, 1, W + 1] squeezed). state_NWC [N, W, C] holds
the last W raw inputs of every slot, oldest first; a new sequence starts from zeros. Sums and SiLU are in
fp32, y has x's dtype. slots_B is int64 [B]. Slots that are not named stay bit-identical. A slot named twice
in one call (padding rows share a sink slot) ends with any one of the rows written to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.delta.conv1d import reference
from thalweg.ops.host_tables import Boundaries
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain.triton_support import why_not

PIECE = 16  # tokens of a sequence that a program of the kernel takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv1dDims:
    C: int  # channels
    W: int  # inputs that a state remembers


class Conv1dPrefill(Protocol):
    def __call__(
        self,
        x_TC: Tensor,
        state_NWC: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        weight_CW: Tensor,
        /,
        *,
        boundaries: Boundaries = (),
    ) -> Tensor:
        """y_TC for sequences of any length: sequence b owns tokens offsets[b]:offsets[b + 1].

        The state of its slot is read first and moves on by its length, in place: a sequence shorter than W
        shifts it, one of length 0 leaves it bit-identical. x may have any strides. `boundaries` as in "kda_prefill".
        """


CONV1D_PREFILL: Op[Conv1dDims, Conv1dPrefill] = Op("conv1d_prefill", Conv1dDims, rows="prefills")


def _triton(where: Where, dims: Conv1dDims) -> Conv1dPrefill:
    from thalweg.ops.delta.conv1d import triton

    return triton.conv1d_prefill


def _triton_refuses(where: Where, dims: Conv1dDims) -> Refusal:
    if dims.W > PIECE:  # a later piece would reach back to the state, which the sequence's first one moves on
        return f"needs a convolution that remembers at most {PIECE} inputs, not {dims.W}"
    return why_not(where)


register(CONV1D_PREFILL, "reference", lambda *_: reference.conv1d_prefill)
register(CONV1D_PREFILL, "triton", _triton, supports=_triton_refuses, priority=10, capturable=True)
