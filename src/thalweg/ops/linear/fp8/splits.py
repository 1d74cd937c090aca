"""The three linears over float8 for some tokens, each in one launch (ops/linear/triton/splits.py)."""

from thalweg.ops.linear.fp8.by_product import linears_by
from thalweg.ops.linear.triton.splits import product

linear_fp8, norm_linear_fp8, linear_add_fp8 = linears_by(product)
