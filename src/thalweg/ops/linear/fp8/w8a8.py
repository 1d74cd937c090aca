"""Linear projections of many tokens over float8 at the rate of Hopper's matrix unit (ops/products says how it works): x
goes to float8 too, in a launch of its own that has the norm."""

from __future__ import annotations

from torch import Tensor

from thalweg.ops.linear.fp8.by_product import linears_by
from thalweg.ops.products.cuda import dense
from thalweg.ops.products.triton import quantize_rows
from thalweg.ops.toolchain.cuda_build import aligned_rows


def _product(
    x_TD: Tensor,
    q_OD: Tensor,
    scale_OB: Tensor,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """[T, O] = x w^T, of x or its RMSNorm; in out_TO if it is given, or added to the residual in its place."""
    if residual_TO is not None:
        out_TO = aligned_rows(residual_TO)
    y_TO = x_TD.new_empty(len(x_TD), len(q_OD)) if out_TO is None else out_TO
    if len(x_TD):
        rows, x_scales_T, w_scales_BO = quantize_rows(x_TD, scale_OB, norm)
        dense(rows, q_OD, x_scales_T, w_scales_BO, y_TO, add=residual_TO is not None)
    return y_TO


linear_fp8, norm_linear_fp8, linear_add_fp8 = linears_by(_product)
