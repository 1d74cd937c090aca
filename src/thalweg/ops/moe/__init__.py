"""Ops "route", "norm_router", "experts" and "experts_add": top-k routing, alone and with its norm and projection, and
the experts' SwiGLU networks, alone and added to the residual.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor

from thalweg.ops.moe import cuda_router, reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper

Scoring = Literal["sigmoid", "softmax"]


class Route(Protocol):
    def __call__(
        self,
        logits_TE: Tensor,
        bias_E: Tensor,
        top_k: int,
        renormalize: bool,
        scale: float,
        scoring: Scoring = "sigmoid",
        n_group: int = 1,
        topk_group: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """(weights_Tk fp32, ids_Tk int64): the top_k experts of each token and what their outputs count.

        Scores are sigmoid or softmax of fp32 logits_TE. The experts are those with the largest score +
        bias_E; the bias serves this choice only, a weight is the unbiased score. renormalize divides the
        weights of a token by their sum + 1e-20; `scale` multiplies them last. With n_group > 1 the experts
        form n_group equal groups in order, and only the topk_group groups with the largest sum of their two
        best biased scores compete (DeepSeek-V3). Experts come best first. Raises ConfigError on an unknown
        `scoring`.
        """


class NormRouter(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        w_ED: Tensor,
        bias_E: Tensor,
        top_k: int,
        renormalize: bool,
        scale: float,
        scoring: Scoring = "sigmoid",
        n_group: int = 1,
        topk_group: int = 1,
        num_shared: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(n_TD, weights fp32, ids int64), the latter two [T, top_k + num_shared]: n is "rms_norm" of x, and the
        routing "route" of the fp32 logits n @ w_ED.T.

        The products are of values converted to fp32: rounding logits would flip choices. The shared experts
        follow the chosen ones as ids E .. E + num_shared - 1 with weight 1, so that "experts" can hold them
        behind the routed ones. The routed order within a token is best first. Raises ConfigError as "route".
        """


class Experts(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        w_gate_up_E2ID: Tensor,
        w_down_EDI: Tensor,
        /,
        num_shared: int = 0,
    ) -> Tensor:
        """y_TD = sum over a token's k experts of weight * (silu(x @ gate.T) * (x @ up.T)) @ down.T.

        w_gate_up_E2ID [E, 2I, D] holds gate, then up; w_down_EDI [E, D, I]. x and both weights share one
        dtype, which y has too; weights_Tk is fp32 and the sum over experts is in fp32. weights_Tk and ids_Tk are
        contiguous. Cost grows with T * k alone. A token's experts differ. num_shared promises that the last num_shared
        ids of every token are E - num_shared .. E - 1, as "norm_router" gives them: kernels then start on those before
        it is done.
        """


class ExpertsAdd(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        w_gate_up_E2ID: Tensor,
        w_down_EDI: Tensor,
        residual_TD: Tensor,
        /,
        num_shared: int = 0,
    ) -> Tensor:
        """residual_TD + "experts" of the rest. Whether that is rounded to the dtype before it is added is open.

        No input is changed.
        """


def _triton_router(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    from thalweg.ops.moe import triton_router

    return triton_router.norm_router(*args, **options)


def _triton_experts(*args: Any, **options: Any) -> Tensor:
    from thalweg.ops.moe import triton_experts

    return triton_experts.experts(*args, **options)


def _triton_experts_add(*args: Any, **options: Any) -> Tensor:
    from thalweg.ops.moe import triton_experts

    return triton_experts.experts_add(*args, **options)


MAX_WIDTH = 16384  # of a row that is normed
MAX_ROUTER_EXPERTS = 1024  # one program holds all scores of a token in registers


def _router_supports(ctx: OpContext) -> str | None:
    if ctx.dims.get("E", 0) > MAX_ROUTER_EXPERTS:
        return f"needs at most {MAX_ROUTER_EXPERTS} experts, not {ctx.dims['E']}"
    if ctx.dims.get("G", 1) != 1:
        return f"needs experts in one group, not {ctx.dims['G']}"
    if ctx.dims.get("D", 0) > MAX_WIDTH:
        return f"needs rows of at most {MAX_WIDTH}, not {ctx.dims['D']}"
    return why_not(ctx)


def _cuda_router_supports(ctx: OpContext) -> str | None:
    if ctx.dims.get("G", 1) != 1:
        return f"needs experts in one group, not {ctx.dims['G']}"
    if ctx.dtype != "bfloat16":
        return f"needs bfloat16, not {ctx.dtype}"
    E, D, K, S = (ctx.dims.get(name, 0) for name in "EDKS")
    return cuda_router.refusal(E, D, K + S) or cuda_build.why_not(ctx) or why_not_hopper()


_route: Route = reference.route
_reference_router: NormRouter = reference.norm_router
_kernel_router: NormRouter = _triton_router
_cluster_router: NormRouter = cuda_router.norm_router
_reference_experts: Experts = reference.experts
_kernel_experts: Experts = _triton_experts
_reference_experts_add: ExpertsAdd = reference.experts_add
_kernel_experts_add: ExpertsAdd = _triton_experts_add
register("route", "reference", _route)
register("norm_router", "reference", _reference_router)
register("norm_router", "triton", _kernel_router, supports=_router_supports, priority=10)
register("norm_router", "cuda", _cluster_router, supports=_cuda_router_supports, priority=20)
register("experts", "reference", _reference_experts, capturable=False)
register("experts", "triton", _kernel_experts, supports=why_not, priority=10)
register("experts_add", "reference", _reference_experts_add, capturable=False)
register("experts_add", "triton", _kernel_experts_add, supports=why_not, priority=10)
