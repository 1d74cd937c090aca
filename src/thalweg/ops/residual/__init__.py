"""Op "scaled_residual_add": routed experts scaled, shared experts and residual added, in one pass (Kimi-K2). Op
"gated_add": a shared expert, through its gate if it has one, and the residual (Qwen)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.registry import Op, Where, register
from thalweg.ops.residual import cpp, reference
from thalweg.ops.toolchain import cpu_build
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledResidualAddDims:
    D: int


class ScaledResidualAdd(Protocol):
    def __call__(self, residual_TD: Tensor, a_TD: Tensor, b_TD: Tensor, scale: float, /) -> Tensor:
        """y_TD = residual + (a + scale * b), of contiguous tensors of one shape and dtype, which y has too.

        Sums are in fp32, scale * b + a with one rounding. It is rounded to the dtype before the residual is added: the
        bits are those of the two additions by themselves.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedAddDims:
    D: int


class GatedAdd(Protocol):
    def __call__(self, residual_TD: Tensor, a_TD: Tensor, gate_T1: Tensor | None, /) -> Tensor:
        """y_TD = residual + a * sigmoid(gate), or residual + a without a gate, of one dtype, which y has too. The
        residual has a unit last stride; a and y are contiguous. Factor and product are rounded to the dtype."""


SCALED_RESIDUAL_ADD: Op[ScaledResidualAddDims, ScaledResidualAdd] = Op("scaled_residual_add", ScaledResidualAddDims)
GATED_ADD: Op[GatedAddDims, GatedAdd] = Op("gated_add", GatedAddDims)


def _triton(where: Where, dims: ScaledResidualAddDims) -> ScaledResidualAdd:
    from thalweg.ops.residual.triton import scaled_residual_add

    return scaled_residual_add


register(SCALED_RESIDUAL_ADD, "reference", lambda *_: reference.scaled_residual_add)
register(SCALED_RESIDUAL_ADD, "separate", lambda *_: reference.two_additions, priority=-10, recordable=False)
register(SCALED_RESIDUAL_ADD, "triton", _triton, supports=why_not, priority=10)

register(GATED_ADD, "reference", lambda *_: reference.gated_add)
register(GATED_ADD, "cpp", lambda *_: cpp.gated_add, supports=cpu_build.why_not, priority=10)
