"""Ops "kda_gate" and "kda_prefill": Kimi Delta Attention; `reference.kda_decode` is the same for one token of each
sequence, as op "kda_mixer_decode" has it.

For one head with state S [V, K] (kept as [N, H, V, K] over all slots, key dim contiguous), per token:

    q, k <- q / sqrt(sum q^2 + 1e-6), likewise k;  q <- q * K^-0.5
    S <- S * exp(g)                    g is a log decay per key channel, <= 0, without a lower bound
    S <- S + beta * (v - S k) k^T
    o  = S q

q and k come raw: the ops normalise and scale them. Maths is in fp32, o has v's dtype; the state is fp32
storage, or bf16 storage that is rounded once per call. A new sequence starts from a zero state. slots_B is
int64 [B]; slots that are not named stay bit-identical. A slot named twice (padding rows share a sink slot)
ends with any one of the rows written to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.delta.kda import reference
from thalweg.ops.host_tables import Boundaries
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain.triton_support import why_not

BOUNDARY = 64  # tokens: every implementation has a state after a multiple of these


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaDims:
    H: int
    K: int
    V: int


class KdaGate(Protocol):
    def __call__(self, f_THK: Tensor, A_log_H: Tensor, dt_bias_HK: Tensor, /) -> Tensor:
        """g_THK fp32 = -exp(A_log) * softplus(f + dt_bias): the log decay, <= 0 and unbounded below."""


class KdaPrefill(Protocol):
    def __call__(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        g_THK: Tensor,
        beta_TH: Tensor,
        *,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        boundaries: Boundaries = (),
    ) -> Tensor:
        """o_THV for sequences of any length: sequence b owns tokens offsets[b]:offsets[b + 1].

        It starts from the state of its slot, which is updated in place; length 0 leaves it bit-identical. Inputs of
        tokens may have any strides.

        For each (b, n, slot) of `boundaries` the state of sequence b after n of its tokens, a multiple of
        BOUNDARY, is written into `slot` too, which no sequence of the call has.
        """


KDA_GATE: Op[KdaDims, KdaGate] = Op("kda_gate", KdaDims, rows="prefills")
KDA_PREFILL: Op[KdaDims, KdaPrefill] = Op("kda_prefill", KdaDims, rows="prefills")


def _triton_gate(where: Where, dims: KdaDims) -> KdaGate:
    from thalweg.ops.delta.kda.triton import gate

    return gate.kda_gate


def _triton_prefill(where: Where, dims: KdaDims) -> KdaPrefill:
    from thalweg.ops.delta.kda.triton import prefill

    return prefill.kda_prefill


def _prefill_refuses(where: Where, dims: KdaDims) -> Refusal:
    if not 1 <= min(dims.K, dims.V) <= max(dims.K, dims.V) <= 128:
        return f"needs heads of at most 128, not {dims.K} and {dims.V}"
    return why_not(where)


register(KDA_GATE, "reference", lambda *_: reference.kda_gate, capturable=True)
register(KDA_GATE, "triton", _triton_gate, supports=why_not, priority=10, capturable=True)
register(KDA_PREFILL, "reference", lambda *_: reference.kda_prefill)
register(KDA_PREFILL, "triton", _triton_prefill, supports=_prefill_refuses, priority=10, capturable=True)
