"""Ops "linear_fp8", "norm_linear_fp8" and "linear_add_fp8": those of ops/linear over weights in float8.

A weight is q * scale: q float8_e4m3fn [O, D], and one fp32 scale, any positive number, for each row and 128 columns. It
is rounded to x's dtype or used as it is. Whether activations are quantized is open in bf16, each row with a scale of
its own; they are not in fp32. Below the weight may lie rows in x's dtype: what a checkpoint keeps out of float8 of
matrices that are fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.linear.fp8 import cuda, reference
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.triton_support import processors_here, why_not, why_not_hopper
from thalweg.quant.blocks import BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8LinearDims:
    D: int  # columns of x
    O: int  # rows in float8
    rest: int = 0  # rows below them in x's dtype


class LinearFp8(Protocol):
    def __call__(self, x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None = None, /) -> Tensor:
        """y = x @ w.T [T, O + R], accumulated in fp32 and rounded once to x's dtype; w is q * scale above the rest."""


class NormLinearFp8(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        q_OD: Tensor,
        scale_OB: Tensor,
        rest_RD: Tensor | None = None,
        /,
        *,
        in_float8: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """y = "linear_fp8" of "rms_norm" of x_TD, which is rounded to the dtype in between, before or after a row is
        divided by its root mean square. The norm's weight is in x's dtype or fp32. in_float8 is that norm in e4m3
        [T, D] and the scales of its rows, fp32 [T], as an op ahead has computed it (NextNorm): for those that quantize
        activations."""


class LinearAddFp8(Protocol):
    def __call__(self, x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor, /) -> Tensor:
        """y_TO = residual + x @ w.T, as "linear_add" of ops/linear. There is no rest."""


LINEAR_FP8: Op[Fp8LinearDims, LinearFp8] = Op("linear_fp8", Fp8LinearDims)
NORM_LINEAR_FP8: Op[Fp8LinearDims, NormLinearFp8] = Op("norm_linear_fp8", Fp8LinearDims)
LINEAR_ADD_FP8: Op[Fp8LinearDims, LinearAddFp8] = Op("linear_add_fp8", Fp8LinearDims)

FEW = Tokens(last=16)  # beyond, x does not fit the registers of a block
SOME, SOME_OF_MANY_ROWS = Tokens(17, 128), Tokens(17, 64)  # the latter if more rows than tiles have of more tokens
W8A8: dict[str, Any] = {"rounding": 0.04}  # 0.027 for normally distributed activations
# "splits" is a launch where "matrix" has another that brings x to float8; of Kimi-K2's columns, whose layers have 9 so.
SPLIT_COLUMNS, SPLIT_TOKENS = (1536, *range(7168, 8193, BLOCK)), Tokens(17, 64)
MAX_NORM = 16384  # columns that the norm's kernel takes
MAX_CUDA_NORM, MAX_NORM_ROWS = 8192, 2**16  # beyond both a norm's weight and the sums do not fit shared memory
MAX_SOME_ROWS = 2**14
REST_ROWS, REST_TOKENS = 16, 16  # of a block of the rest, beside tiles of more than 64 tokens
TILE_ROWS = {128: 128, 64: 192}  # of a block at most, by tokens: 64 for each warpgroup that has registers for them
MAX_ROWS = 2**18  # of which the sums over passes fit shared memory


def _triton_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    if dims.D % (BLOCK // 2) or not dims.D:
        return f"needs D to be a multiple of {BLOCK // 2}, not {dims.D}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return why_not(where)


def _triton_norm_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    return f"needs D of at most {MAX_NORM}, not {dims.D}" if dims.D > MAX_NORM else _triton_refuses(where, dims)


def _cuda_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    if dims.O % 8 or not 0 < dims.O <= MAX_ROWS:
        return f"needs O to be a multiple of 8 up to {MAX_ROWS}, not {dims.O}"
    if dims.D % BLOCK or (dims.D > 4096 and dims.D % 512):
        return f"needs D to be a multiple of {BLOCK}, beyond 4096 of 512, not {dims.D}"
    return _triton_refuses(where, dims) or cuda_build.why_not(where) or why_not_hopper()


def _cuda_norm_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    if dims.D > MAX_CUDA_NORM and dims.O > MAX_NORM_ROWS:  # the norm would not fit beside the sums
        return f"needs D of at most {MAX_CUDA_NORM} or O of at most {MAX_NORM_ROWS}, not {dims.D} and {dims.O}"
    return _cuda_refuses(where, dims)


def _splits_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    if dims.D not in SPLIT_COLUMNS or dims.O % 8 or not 0 < dims.O <= MAX_SOME_ROWS:
        least, *_, most = SPLIT_COLUMNS
        wanted = f"{least} columns, or a multiple of {BLOCK} from {SPLIT_COLUMNS[1]} to {most}, and"
        return f"needs {wanted} a multiple of 8 rows up to {MAX_SOME_ROWS}, not {dims.D} and {dims.O}"
    if dims.rest:
        return f"has no products for a rest, here of {dims.rest} rows"
    return _triton_refuses(where, dims) or why_not_hopper()


def _w8a8_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    if dims.D % BLOCK or not dims.D:
        return f"needs D to be a multiple of {BLOCK}, not {dims.D}"
    if dims.O % 8 or dims.rest % 8 or not dims.O:
        return f"needs O and the rest to be multiples of 8, not {dims.O} and {dims.rest}"
    return _triton_refuses(where, dims) or cuda_build.why_not(where) or why_not_hopper()


def _w8a8_norm_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    return _triton_norm_refuses(where, dims) or _w8a8_refuses(where, dims)


def _some(dims: Fp8LinearDims) -> Tokens:
    rest = -(-dims.rest // REST_ROWS) * -(-128 // REST_TOKENS)
    most = TILE_ROWS[128] * (processors_here() - rest)
    return SOME if most >= dims.O else SOME_OF_MANY_ROWS


def _more(dims: Fp8LinearDims) -> Tokens:
    return Tokens((_some(dims).last or 0) + 1)


def _matrix_refuses(where: Where, dims: Fp8LinearDims) -> Refusal:
    if dims.D % BLOCK or not 0 < dims.D <= MAX_NORM:
        return f"needs D to be a multiple of {BLOCK} up to {MAX_NORM}, not {dims.D}"
    most = min(MAX_SOME_ROWS, TILE_ROWS[_some(dims).last or 0] * processors_here())
    if dims.O % 8 or not 0 < dims.O <= most:
        return f"needs O to be a multiple of 8 up to {most}, not {dims.O}"
    if dims.rest % 8:
        return f"needs the rest to be a multiple of 8, not {dims.rest}"
    return _triton_refuses(where, dims) or cuda_build.why_not(where) or why_not_hopper()


class Forms(Protocol):
    """A module that has the three ops."""

    @property
    def linear_fp8(self) -> LinearFp8: ...
    @property
    def norm_linear_fp8(self) -> NormLinearFp8: ...
    @property
    def linear_add_fp8(self) -> LinearAddFp8: ...


def _triton() -> Forms:
    from thalweg.ops.linear.fp8 import triton

    return triton


def _w8a8() -> Forms:
    from thalweg.ops.linear.fp8 import w8a8

    return w8a8


def _matrix() -> Forms:
    from thalweg.ops.linear.fp8 import matrix

    return matrix


def _splits() -> Forms:
    from thalweg.ops.linear.fp8 import splits

    return splits


def _register(
    name: str,
    forms: Callable[[], Forms],
    refuses: Callable[[Where, Fp8LinearDims], Refusal] = lambda _where, _dims: None,
    norm_refuses: Callable[[Where, Fp8LinearDims], Refusal] | None = None,
    **options: Any,
) -> None:
    """norm_refuses: of "norm_linear_fp8", if it is not the same."""
    register(LINEAR_FP8, name, lambda *_: forms().linear_fp8, supports=refuses, **options)
    register(NORM_LINEAR_FP8, name, lambda *_: forms().norm_linear_fp8, supports=norm_refuses or refuses, **options)
    register(LINEAR_ADD_FP8, name, lambda *_: forms().linear_add_fp8, supports=refuses, **options)


_register("reference", lambda: reference)
_register("triton", _triton, _triton_refuses, _triton_norm_refuses, priority=10)
_register("w8a8", _w8a8, _w8a8_refuses, _w8a8_norm_refuses, tokens=_more, priority=15, **W8A8)
_register("matrix", _matrix, _matrix_refuses, tokens=_some, priority=17, **W8A8)
_register("splits", _splits, _splits_refuses, tokens=SPLIT_TOKENS, priority=18, **W8A8)
_register("cuda", lambda: cuda, _cuda_refuses, _cuda_norm_refuses, tokens=FEW, priority=20)
