"""Op "gdn_decode_add": the mixer of a Gated DeltaNet layer's decode step and its output projection over float8, as one,
if that saves the launch which brings what lies between to float8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.delta.gdn import GDN_MIXER_DECODE, GdnDims
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, W8A8, Fp8LinearDims
from thalweg.ops.registry import Op, Refusal, Tokens, Where, implementations, register


@dataclass(frozen=True, slots=True, kw_only=True)
class GdnDecodeAddDims:
    mixer: GdnDims
    linear: Fp8LinearDims  # of the output projection


class GdnDecodeAdd(Protocol):
    def __call__(
        self,
        proj_BX: Tensor,
        residual_BD: Tensor,
        apart: Callable[[Tensor, Tensor], Tensor],
        *,
        q_OD: Tensor,
        scale_OB: Tensor,
        conv_weight_CW: Tensor,
        conv_state_NWC: Tensor,
        A_log_H: Tensor,
        dt_bias_H: Tensor,
        norm_weight_V: Tensor,
        eps: float,
        state_NHVK: Tensor,
        slots_B: Tensor,
    ) -> Tensor:
        """y_BD = residual + "linear_add_fp8" of "gdn_mixer_decode" of proj, whose inputs these are.

        `apart(proj_BX, residual_BD)` computes the same by these two ops. If activations are quantized, each head of
        a token has a scale of its own.
        """


GDN_DECODE_ADD: Op[GdnDecodeAddDims, GdnDecodeAdd] = Op("gdn_decode_add", GdnDecodeAddDims, rows="decodes")


def _apart(proj_BX: Tensor, residual_BD: Tensor, apart: Callable[[Tensor, Tensor], Tensor], **inputs: object) -> Tensor:
    return apart(proj_BX, residual_BD)


def refusal(where: Where, dims: GdnDecodeAddDims) -> Refusal:
    """Why the two are not one there, or None: a layer then need not ask for this op."""
    if dims.linear.rest or dims.linear.D != dims.mixer.H * dims.mixer.V:
        return f"needs a projection of {dims.mixer.H} heads of {dims.mixer.V} alone, not of {dims.linear}"
    for op, name, of in ((GDN_MIXER_DECODE, "cuda", dims.mixer), (LINEAR_ADD_FP8, "matrix", dims.linear)):
        (found,) = (i for i in implementations(op.name) if i.name == name)
        if reason := found.supports(where, of):
            return reason
    return None


def _tokens(dims: GdnDecodeAddDims) -> Tokens:
    """Those for which the projection quantizes activations."""
    (matrix,) = (i for i in implementations(LINEAR_ADD_FP8.name) if i.name == "matrix")
    return matrix.tokens(dims.linear)


def _cuda(where: Where, dims: GdnDecodeAddDims) -> GdnDecodeAdd:
    from thalweg.ops.delta.gdn_decode_add import cuda

    return cuda.gdn_decode_add


register(GDN_DECODE_ADD, "reference", lambda *_: _apart)
register(GDN_DECODE_ADD, "cuda", _cuda, supports=refusal, tokens=_tokens, priority=10, **W8A8)
