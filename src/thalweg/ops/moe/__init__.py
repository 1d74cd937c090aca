"""Ops "norm_router" and "experts": a norm with top-k routing of its result, and the experts' SwiGLU networks with the
sum that ends them. `reference.route` is the choice by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from thalweg.ops.moe import cuda_router, reference
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper

Scoring = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRouterDims:
    E: int  # experts that are chosen from
    D: int
    K: int  # experts per token
    G: int  # groups of experts
    S: int  # shared experts, appended to those chosen
    norm_fp32: bool = False  # whether the norm's weight is fp32 whatever x is


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsDims:
    E: int  # all experts, shared ones included
    D: int
    I: int  # width of an expert


class NormRouter(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        w_ED: Tensor,
        bias_E: Tensor,
        *,
        top_k: int,
        renormalize: bool,
        scale: float,
        scoring: Scoring = "sigmoid",
        n_group: int = 1,
        topk_group: int = 1,
        num_shared: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(n_TD, weights fp32, ids int64), the latter two [T, top_k + num_shared]: n is "rms_norm" of x, and the
        routing `reference.route` of the fp32 logits n @ w_ED.T.

        The products are of values converted to fp32: rounding logits would flip choices. The shared experts
        follow the chosen ones as ids E .. E + num_shared - 1 with weight 1, so that "experts" can hold them
        behind the routed ones. The routed order within a token is best first. Raises ConfigError as `route`.

        x has a unit last stride and any row stride. It shares its dtype with both weights, which are contiguous, unless
        the norm's is fp32; bias_E is fp32.
        """


class Experts(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        w_gate_up_E2ID: Tensor,
        w_down_EDI: Tensor,
        *,
        residual_TD: Tensor | None = None,
        num_shared: int = 0,
    ) -> Tensor:
        """y_TD = sum over a token's k experts of weight * (silu(x @ gate.T) * (x @ up.T)) @ down.T, plus the residual.

        w_gate_up_E2ID [E, 2I, D] holds gate, then up; w_down_EDI [E, D, I]. x, residual and both weights share one
        dtype, which y has too; weights_Tk is fp32 and the sum over experts is in fp32. Whether it is rounded to the
        dtype before the residual is added is open. No input is changed.

        x and residual have a unit last stride and any row stride; the other inputs are contiguous. Cost grows with
        T * k alone. A token's experts differ. num_shared promises that the last num_shared ids of every token are
        E - num_shared .. E - 1, as "norm_router" gives them: kernels then start on those before it is done.
        """


NORM_ROUTER: Op[NormRouterDims, NormRouter] = Op("norm_router", NormRouterDims)
EXPERTS: Op[ExpertsDims, Experts] = Op("experts", ExpertsDims)

MAX_WIDTH = 16384  # of a row that is normed
MAX_ROUTER_EXPERTS = 1024  # one program holds all scores of a token in registers


def _router_refuses(where: Where, dims: NormRouterDims) -> Refusal:
    if dims.E > MAX_ROUTER_EXPERTS:
        return f"needs at most {MAX_ROUTER_EXPERTS} experts, not {dims.E}"
    if dims.G != 1:
        return f"needs experts in one group, not {dims.G}"
    if dims.D > MAX_WIDTH:
        return f"needs rows of at most {MAX_WIDTH}, not {dims.D}"
    return why_not(where)


def _cuda_router_refuses(where: Where, dims: NormRouterDims) -> Refusal:
    if dims.G != 1:
        return f"needs experts in one group, not {dims.G}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    if dims.norm_fp32:
        return "needs the norm's weight in bfloat16, not float32"
    return cuda_router.refusal(dims.E, dims.D, dims.K + dims.S) or cuda_build.why_not(where) or why_not_hopper()


def _library_router(where: Where, dims: NormRouterDims) -> NormRouter:
    from thalweg.ops.moe.triton import router

    return router.norm_router_by_library


def _triton_router(where: Where, dims: NormRouterDims) -> NormRouter:
    from thalweg.ops.moe.triton import router

    return router.norm_router


def _pairs(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.triton import experts

    return experts.experts_of_pairs


def _tiles(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.triton import experts

    return experts.experts_of_tiles


def _grouped(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.triton import grouped

    return grouped.experts_grouped


register(NORM_ROUTER, "reference", lambda *_: reference.norm_router)
register(NORM_ROUTER, "library", _library_router, supports=_router_refuses, priority=10)
# Beyond, a product fills the device without being split.
register(NORM_ROUTER, "triton", _triton_router, supports=_router_refuses, tokens=Tokens(last=512), priority=20)
# Beyond, clusters take turns, and products of many tokens at once are quicker.
register(
    NORM_ROUTER,
    "cuda",
    lambda *_: cuda_router.norm_router,
    supports=_cuda_router_refuses,
    tokens=Tokens(last=128),
    priority=30,
)

register(EXPERTS, "reference", lambda *_: reference.experts, capturable=False)
register(EXPERTS, "grouped", _grouped, supports=why_not, priority=10)
register(EXPERTS, "tiles", _tiles, supports=why_not, tokens=Tokens(last=512), priority=20)
register(EXPERTS, "pairs", _pairs, supports=why_not, tokens=Tokens(last=2), priority=30)
