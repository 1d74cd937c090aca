"""Ops "kda_gate", "kda_decode" and "kda_prefill": Kimi Delta Attention.

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
from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.delta.kda import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain.triton_support import why_not


class KdaGate(Protocol):
    def __call__(self, f_THK: Tensor, A_log_H: Tensor, dt_bias_HK: Tensor, /) -> Tensor:
        """g_THK fp32 = -exp(A_log) * softplus(f + dt_bias): the log decay, <= 0 and unbounded below."""


class KdaDecode(Protocol):
    def __call__(
        self,
        q_BHK: Tensor,
        k_BHK: Tensor,
        v_BHV: Tensor,
        g_BHK: Tensor,
        beta_BH: Tensor,
        state_NHVK: Tensor,
        slots_B: Tensor,
        /,
    ) -> Tensor:
        """o_BHV for one new token of each sequence; the state of its slot is updated in place."""


class KdaPrefill(Protocol):
    def __call__(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        g_THK: Tensor,
        beta_TH: Tensor,
        state_NHVK: Tensor,
        slots_B: Tensor,
        offsets: Sequence[int],
        /,
    ) -> Tensor:
        """o_THV for sequences of any length: sequence b owns tokens offsets[b]:offsets[b + 1].

        It starts from the state of its slot, which is updated in place; length 0 leaves it bit-identical.
        """


def _triton_gate(f_THK: Tensor, A_log_H: Tensor, dt_bias_HK: Tensor) -> Tensor:
    from thalweg.ops.delta.kda import triton_gate

    return triton_gate.kda_gate(f_THK, A_log_H, dt_bias_HK)


def _triton_prefill(*args: Any) -> Tensor:
    from thalweg.ops.delta.kda import triton_prefill

    return triton_prefill.kda_prefill(*args)


def _prefill_refuses(ctx: OpContext) -> str | None:
    K, V = ctx.dims.get("K", 0), ctx.dims.get("V", 0)
    return why_not(ctx) if 1 <= min(K, V) <= max(K, V) <= 128 else f"needs heads of at most 128, not {K} and {V}"


_gate: KdaGate = reference.kda_gate
_decode: KdaDecode = reference.kda_decode
_prefill: KdaPrefill = reference.kda_prefill
_kernel_gate: KdaGate = _triton_gate
register("kda_gate", "reference", _gate)
register("kda_decode", "reference", _decode)
register("kda_prefill", "reference", _prefill)
register("kda_gate", "triton", _kernel_gate, supports=why_not, priority=10)
register("kda_prefill", "triton", _triton_prefill, supports=_prefill_refuses, priority=10)
