"""Op "routed_experts": norm, choice of experts, and these experts, as one, where that is less than each by itself.

One token's experts wait for its router, whose launch leaves memory idle meanwhile. Within the experts' first launch the
router takes its turn while the weights stream that every token takes. Of a batch of tokens whose experts multiply in
float8 ("w8a8"), the router's launch does what would otherwise be one more: x in float8, and each expert's pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.moe.experts import EXPERTS, FEWEST_W8A8, ExpertsDims
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims, Scoring
from thalweg.ops.norm import NextNorm
from thalweg.ops.registry import Op, Refusal, Tokens, Where, implementations, register


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedExpertsDims:
    experts: ExpertsDims
    K: int  # chosen ones of a token
    G: int  # groups of experts
    S: int  # shared experts behind those that are chosen from
    scoring: Scoring
    renormalize: bool
    gated: bool = False  # whether shared ones have a gate
    norm_fp32: bool = False  # whether the norm's weight is fp32 whatever x is


class RoutedExperts(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        apart: Callable[[Tensor], Tensor],
        norm_weight_D: Tensor,
        eps: float,
        router_ED: Tensor,
        bias_E: Tensor,
        gate_up: tuple[Tensor, ...],
        down: tuple[Tensor, ...],
        *,
        router_scale: float,
        own: tuple[Tensor, Tensor] | None,
        scale: float,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        """y_TD = x + "experts" of what "norm_router" gives of x, whose inputs these are, router_scale being its scale.

        `apart` computes the same by these two ops, in launches of their own, next_norm included. x has a unit last
        stride and any row stride.
        """


ROUTED_EXPERTS: Op[RoutedExpertsDims, RoutedExperts] = Op("routed_experts", RoutedExpertsDims)

COLUMNS = 4096  # of fewer it has not been timed
NARROW_COLUMNS, NARROW_TOKENS = 2048, Tokens(FEWEST_W8A8, 128)  # 128 columns for each of the router's blocks
ROUTER_ROWS, MAX_SLOTS = 3, 16  # of a block of the kernels; of a token


def _apart(x_TD: Tensor, apart: Callable[[Tensor], Tensor], *inputs: object, **options: object) -> Tensor:
    return apart(x_TD)


def refusal(where: Where, dims: RoutedExpertsDims) -> Refusal:
    """Why the two are not one there for any number of tokens, or None: a layer then need not ask for this op."""
    one = _one_refuses(where, dims)
    return one if one is None else _narrow_refuses(where, dims) and one


def _narrow_refuses(where: Where, dims: RoutedExpertsDims) -> Refusal:
    if dims.experts.D != NARROW_COLUMNS or dims.G > 1:
        return f"needs {NARROW_COLUMNS} columns and experts in one group, not {dims.experts.D} and {dims.G} groups"
    E, of = dims.experts.E - dims.S, dims.experts
    router = NormRouterDims(E=E, D=of.D, K=dims.K, G=dims.G, S=dims.S, gated=dims.gated, norm_fp32=dims.norm_fp32)
    for op, name, part in ((EXPERTS, "tiles_w8a8", of), (NORM_ROUTER, "cuda", router)):
        (found,) = (i for i in implementations(op.name) if i.name == name)
        if reason := found.supports(where, part):
            return reason
    return None


def _one_refuses(where: Where, dims: RoutedExpertsDims) -> Refusal:
    E, D = dims.experts.E - dims.S, dims.experts.D
    if dims.scoring != "sigmoid" or not dims.renormalize or dims.G > 1 or dims.gated or dims.norm_fp32:
        return "needs sigmoids, renormalized, experts in one group, no gate of shared ones, and a norm in x's dtype"
    if D < COLUMNS or E % 32 or dims.K + dims.S > MAX_SLOTS:
        wanted = f"{COLUMNS} columns or more, a multiple of 32 experts and at most {MAX_SLOTS} of them a token"
        return f"needs {wanted}, not {D}, {E} and {dims.K + dims.S}"
    if dims.S + bool(dims.experts.own) != 1:
        return "needs one expert that every token takes"
    (cuda,) = (i for i in implementations(EXPERTS.name) if i.name == "cuda")
    if reason := cuda.supports(where, dims.experts):
        return reason
    from thalweg.ops.moe.routed import cuda as together

    return together.refusal(dims)


def _together(where: Where, dims: RoutedExpertsDims) -> RoutedExperts:
    from thalweg.ops.moe.routed import cuda as together

    return together.build(dims)


def _narrow(where: Where, dims: RoutedExpertsDims) -> RoutedExperts:
    from thalweg.ops.moe.routed import narrow

    return narrow.build(dims)


register(ROUTED_EXPERTS, "reference", lambda *_: _apart)
register(ROUTED_EXPERTS, "cuda", _together, supports=_one_refuses, tokens=Tokens(last=1), priority=10)
register(ROUTED_EXPERTS, "w8a8", _narrow, supports=_narrow_refuses, tokens=NARROW_TOKENS, priority=5, rounding=0.06)
