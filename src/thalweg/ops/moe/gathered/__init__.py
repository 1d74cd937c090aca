"""Op "gathered_experts": a rank's experts of all data-parallel ranks' tokens, and the shared expert of its own tokens,
as one, where that is less than each by itself.

The shared expert's weights are known before tokens come, so they stream while ranks wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from thalweg.ops.moe.experts import EXPERTS, MAX_INT4_TOKENS, ExpertsDims, Finish
from thalweg.ops.registry import Op, Refusal, Tokens, Where, implementations, register


class GatheredExperts(Protocol):
    def __call__(
        self,
        x_AD: Tensor,
        apart: Callable[[], Tensor],
        weights_Ak: Tensor,
        ids_Ak: Tensor,
        gate_up: tuple[Tensor, ...],
        down: tuple[Tensor, ...],
        own: tuple[Tensor, Tensor],
        finish: Finish,
        /,
        *,
        own_rows: tuple[int, int],
    ) -> Tensor:
        """What `finish` makes of op "experts" of x, whose inputs these are, given also, as its own_TD, in fp32, what
        the own expert gives for the tokens of `own_rows`, the first one and how many.

        `apart` computes the same by "experts" and the own expert's projections, which may round that. Pairs of id -1
        are left out.
        """


GATHERED_EXPERTS: Op[ExpertsDims, GatheredExperts] = Op("gathered_experts", ExpertsDims)


def _apart(x_AD: Tensor, apart: Callable[[], Tensor], *inputs: object, **options: object) -> Tensor:
    return apart()


def refusal(where: Where, dims: ExpertsDims) -> Refusal:
    """Why the two are not one there for any number of tokens, or None: a layer then need not ask for this op."""
    if dims.scheme != "int4" or not dims.own:
        return f"needs weights in scheme int4 and an own expert, not {dims.scheme} and {dims.own}"
    (cuda,) = (i for i in implementations(EXPERTS.name) if i.name == "cuda")
    return cuda.supports(where, dims)


def _cuda(where: Where, dims: ExpertsDims) -> GatheredExperts:
    from thalweg.ops.moe.experts import cuda_int4

    return cuda_int4.gathered_experts


register(GATHERED_EXPERTS, "reference", lambda *_: _apart)
register(GATHERED_EXPERTS, "cuda", _cuda, supports=refusal, tokens=Tokens(last=MAX_INT4_TOKENS), priority=10)
