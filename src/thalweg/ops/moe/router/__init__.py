"""Op "norm_router": a norm with top-k routing of its result. `reference.route` is the choice by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from thalweg.ops.moe.router import cpp, cuda, few, reference
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper

Scoring = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRouterDims:
    E: int  # experts that are chosen from
    D: int
    K: int  # experts per token
    G: int  # groups of experts
    S: int  # shared experts, appended to those chosen
    gated: bool = False  # whether these have a gate
    norm_fp32: bool = False  # whether the norm's weight is fp32 whatever x is


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
        known_TD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(n_TD, weights fp32, ids int64), the latter two [T, top_k + num_shared]: n is "rms_norm" of x, and the
        routing `reference.route` of the fp32 logits n @ w_ED.T.

        The products are of values converted to fp32: rounding logits would flip choices. The shared experts
        follow the chosen ones as ids E .. E + num_shared - 1 with weight 1, so that "experts" can hold them
        behind the routed ones. They have a gate if w has one row more than bias_E: then their weight is sigmoid of
        what that row gives. The routed order within a token is best first. Raises ConfigError as `route`.

        `known_TD` is n, if that is known; a form that computes it on the way may do so all the same.

        x has a unit last stride and any row stride. It shares its dtype with both weights, which are contiguous, unless
        the norm's is fp32; bias_E is fp32.
        """


NORM_ROUTER: Op[NormRouterDims, NormRouter] = Op("norm_router", NormRouterDims)

MAX_WIDTH = 16384  # of a row that is normed
CPU_FEW = Tokens(last=16)  # beyond, tokens fill the lanes of panels
MAX_EXPERTS = 1024  # one program holds all scores of a token in registers


def _triton_refuses(where: Where, dims: NormRouterDims) -> Refusal:
    if dims.E > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, not {dims.E}"
    if dims.E // dims.G < 2:
        return f"needs groups of 2 experts or more, not {dims.E} in {dims.G}"
    if dims.D > MAX_WIDTH:
        return f"needs rows of at most {MAX_WIDTH}, not {dims.D}"
    return why_not(where)


def _cuda_refuses(where: Where, dims: NormRouterDims) -> Refusal:
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return cuda.refusal(dims.E, dims.D, dims.K + dims.S, dims.G) or cuda_build.why_not(where) or why_not_hopper()


def _few_refuses(where: Where, dims: NormRouterDims) -> Refusal:
    if where.dtype != "bfloat16" or dims.norm_fp32:
        return f"needs x and the norm's weight in bfloat16, not {where.dtype}{' and fp32' if dims.norm_fp32 else ''}"
    if dims.G > 1 or dims.gated:
        return "needs experts in one group, and shared ones without a gate"
    return few.refusal(dims.E, dims.D, dims.K + dims.S) or cuda_build.why_not(where) or why_not_hopper()


def _library(where: Where, dims: NormRouterDims) -> NormRouter:
    from thalweg.ops.moe.router import triton

    return triton.norm_router_by_library


def _triton(where: Where, dims: NormRouterDims) -> NormRouter:
    from thalweg.ops.moe.router import triton

    return triton.norm_router


def _prompts_refuses(where: Where, dims: NormRouterDims) -> Refusal:
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    reason = cuda.prompt_refusal(dims.E, dims.D, dims.K + dims.S, dims.G)
    return reason or cuda_build.why_not(where) or why_not_hopper()


def _few(dims: NormRouterDims) -> Tokens:
    # Beyond, clusters take turns, and products of many tokens at once are quicker.
    return Tokens(last=128 if cuda.parts(dims.E, dims.D) == 1 else 64)


register(NORM_ROUTER, "reference", lambda *_: reference.norm_router)
register(NORM_ROUTER, "cpp", lambda *_: cpp.norm_router, supports=cpu_build.why_not, tokens=CPU_FEW, priority=10)
register(NORM_ROUTER, "panels", lambda *_: cpp.norm_router_many, supports=cpu_build.why_not, priority=5)
register(NORM_ROUTER, "library", _library, supports=_triton_refuses, priority=10)
# Beyond, a product fills the device without being split.
register(NORM_ROUTER, "triton", _triton, supports=_triton_refuses, tokens=Tokens(last=512), priority=20)
register(
    NORM_ROUTER,
    "prompts",
    lambda *_: cuda.norm_router_of_prompts,
    supports=_prompts_refuses,
    tokens=Tokens(last=cuda.MAX_PROMPT_TOKENS),
    priority=25,
)
register(NORM_ROUTER, "cuda", lambda *_: cuda.norm_router, supports=_cuda_refuses, tokens=_few, priority=30)
register(
    NORM_ROUTER,
    "few",
    lambda *_: few.norm_router,
    supports=_few_refuses,
    tokens=Tokens(last=few.MAX_TOKENS),
    priority=40,
)
