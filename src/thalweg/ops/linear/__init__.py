"""Ops "linear", "norm_linear" and "linear_add": x @ w.T without bias, alone, of a norm, and added to the residual;
"linear_reduce_add" is the last with a sum over ranks before, and "linear_ggml" the first with rows of GGML's blocks.
Those of weights in float8 are in `fp8`.

Weights are contiguous, as parameters are. x and a residual have a unit last stride and any row stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.all_reduce import ALL_REDUCE_ADD, AllReduceAddDims, Ranks
from thalweg.ops.linear import blocks_cpp, cpp, cuda, reference, separate
from thalweg.ops.norm import RMS_NORM, NextNorm, RmsNormDims
from thalweg.ops.registry import Op, Refusal, Resolver, Tokens, Where, register
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import processors_here, why_not, why_not_hopper
from thalweg.quant import GgmlRows


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearDims:
    D: int  # columns of x
    O: int  # columns of y


@dataclass(frozen=True, slots=True, kw_only=True)
class NormLinearDims:
    D: int  # columns of x
    parts: tuple[int, ...]  # columns of y: the rows of each matrix that was fused into w
    norm_fp32: bool = False  # whether the norm's weight is fp32 whatever x is


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReduceDims:
    D: int  # columns of x on this rank
    O: int  # columns of y
    ranks: int
    mapped: bool  # whether ranks map each other's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGgmlDims:
    D: int  # columns of x
    O: int  # columns of y
    scheme: str  # which rows of w are in which type: a name of thalweg.quant


class Linear(Protocol):
    def __call__(self, x_TD: Tensor, w_OD: Tensor, /) -> Tensor:
        """y_TO = x_TD @ w_OD.T, accumulated in fp32 and rounded once to the dtype that x and w share.

        y is contiguous. T may be 0.
        """


class NormLinear(Protocol):
    def __call__(self, x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor, /) -> Tensor:
        """y_TO = "linear" of "rms_norm" of x_TD, which is rounded to the dtype in between, before or after a row is
        divided by its root mean square."""


class LinearAdd(Protocol):
    def __call__(self, x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor, /) -> Tensor:
        """y_TO = residual + x @ w.T. Whether the product is rounded to the dtype before it is added is open.

        The residual shares the dtype, and may be overwritten with the result.
        """


class LinearReduceAdd(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        w_OD: Tensor,
        residual_TO: Tensor,
        ranks: Ranks,
        /,
        *,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        """y_TO = residual + the sum over ranks of x @ w.T, as "all_reduce_add" of "linear", next_norm included; whether
        a rank's product is rounded to the dtype before the sum is open."""


class LinearGgml(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        blocks: Tensor,
        /,
        *,
        norm_weight_D: Tensor | None = None,
        eps: float = 0.0,
        residual_TO: Tensor | None = None,
    ) -> Tensor:
        """y_TO = x @ w.T in x's dtype, w being rows of GGML's blocks one after another, uint8 [bytes]; of "rms_norm" of
        x if there is a weight for it, as in "norm_linear"; added to the residual if there is one, as in "linear_add".

        Whether w is rounded to x's dtype is open, and whether x is rounded to 8 bits, in blocks of 32 or 256 columns
        with a scale each, as llama.cpp does.
        """


LINEAR: Op[LinearDims, Linear] = Op("linear", LinearDims)
NORM_LINEAR: Op[NormLinearDims, NormLinear] = Op("norm_linear", NormLinearDims)
LINEAR_ADD: Op[LinearDims, LinearAdd] = Op("linear_add", LinearDims)
LINEAR_REDUCE_ADD: Op[LinearReduceDims, LinearReduceAdd] = Op("linear_reduce_add", LinearReduceDims)
LINEAR_GGML: Op[LinearGgmlDims, LinearGgml] = Op("linear_ggml", LinearGgmlDims)

MAX_COLUMNS, MAX_ROWS = 2**15, 2**18  # of the weight: a norm's weight, and sums over passes, fit shared memory
FEW = Tokens(last=16)  # beyond, the registers of a block hold too little of x
CPU_FEW = Tokens(last=16)  # beyond, tokens fill the lanes of panels
WIDE, WIDE_FEW = 4096, Tokens(last=8)  # more columns: blocks read x for longer, and the library is as fast from 9 on
FEWEST_ROWS = 2048  # of fewer it has not been timed
# Tokens of so many rows; beyond, every block's x is as much as its part of w, unless there are many rows.
SOME, OF_MANY, MANY_ROWS = 32, 128, 65536
# "splits" is a launch where the norm, the library and its sum over parts of columns are three; of more rows the library
# has no parts, and of fewer columns it has not been timed.
SPLIT_COLUMNS, SPLIT_ROWS, SPLIT_TOKENS = 7168, 4096, Tokens(9, 64)
REDUCED = Tokens(17, 128)  # of sums over ranks within "matrix", which save a launch
NORM_COLUMNS, NORM_FEW = 2304, Tokens(last=32)  # so few do; there a norm inside saves its launch, and no time


def _cuda_refuses(where: Where, dims: LinearDims | NormLinearDims | LinearReduceDims) -> Refusal:
    if dims.D % 32 or not 0 < dims.D <= MAX_COLUMNS:
        return f"needs D to be a multiple of 32 up to {MAX_COLUMNS}, not {dims.D}"
    O = sum(dims.parts) if isinstance(dims, NormLinearDims) else dims.O
    if O > MAX_ROWS:
        return f"needs O of at most {MAX_ROWS}, not {O}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return why_not(where) or cuda_build.why_not(where) or why_not_hopper()


def _in_place_refuses(where: Where, dims: LinearDims) -> Refusal:
    return None if where.device == "cuda" else f"saves a launch on cuda, and nothing on {where.device}"


def _separate(where: Where, dims: NormLinearDims) -> NormLinear:
    norm = Resolver().resolve(RMS_NORM, where, RmsNormDims(D=dims.D))
    return partial(separate.norm_linear, norm=norm, parts=dims.parts)


def _few(dims: LinearDims | NormLinearDims | LinearReduceDims) -> Tokens:
    return FEW if dims.D <= WIDE else WIDE_FEW


def _norm_few(dims: NormLinearDims) -> Tokens:
    return NORM_FEW if dims.D <= NORM_COLUMNS else _few(dims)


def _some(dims: LinearDims | NormLinearDims) -> Tokens:
    few, O = (_few(dims), dims.O) if isinstance(dims, LinearDims) else (_norm_few(dims), sum(dims.parts))
    return Tokens((few.last or 0) + 1, OF_MANY if O >= MANY_ROWS else SOME)


def _matrix_refuses(where: Where, dims: LinearDims | NormLinearDims) -> Refusal:
    O = dims.O if isinstance(dims, LinearDims) else sum(dims.parts)
    if dims.D % 8 or O % 8 or not dims.D or O < FEWEST_ROWS:
        return f"needs D and O to be multiples of 8 and O to be at least {FEWEST_ROWS}, not {dims.D} and {O}"
    tokens = _some(dims)
    if tokens.last is not None and tokens.first > tokens.last:
        return f"serves up to {tokens.last} tokens, for which there is 'cuda' with the norm inside"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return why_not(where) or cuda_build.why_not(where) or why_not_hopper()


def _splits_refuses(where: Where, dims: NormLinearDims) -> Refusal:
    O = sum(dims.parts)
    if dims.D % 128 or dims.D < SPLIT_COLUMNS or not 0 < O <= SPLIT_ROWS:
        columns = f"a multiple of 128 columns from {SPLIT_COLUMNS} on"
        return f"needs {columns} and at most {SPLIT_ROWS} rows, not {dims.D} and {O}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return why_not(where) or why_not_hopper()


def _splits_norm_linear(where: Where, dims: NormLinearDims) -> NormLinear:
    from thalweg.ops.linear.triton import splits

    return splits.norm_linear


GATED_TILE_ROWS = 192  # of gate and up together


def fused_gate_up_refuses(name: str, where: Where, dims: NormLinearDims) -> Refusal:
    """Of op "norm_swiglu", which launches "cuda" and "matrix" with the activation behind."""
    if name == "cuda":
        return _cuda_refuses(where, dims)
    most = GATED_TILE_ROWS * processors_here()
    O = sum(dims.parts)
    if O % 16 or most < O:
        return f"needs I to be a multiple of 8 up to {most // 2}, not {O // 2}"
    return _matrix_refuses(where, dims)


def fused_gate_up_tokens(name: str, dims: NormLinearDims) -> Tokens:
    """That "cuda" or "matrix" serves with the activation behind."""
    few = _norm_few(dims)
    return few if name == "cuda" else Tokens((few.last or 0) + 1, OF_MANY)


def _reduce_refuses(where: Where, dims: LinearReduceDims) -> Refusal:
    if not dims.mapped:
        return "needs ranks that map each other's memory"
    if reason := _cuda_refuses(where, dims):
        return reason
    return cuda.reduce_refuses(dims.D, dims.O, _few(dims).last or 0)


def _reduce_separate(where: Where, dims: LinearReduceDims) -> LinearReduceAdd:
    resolver = Resolver()
    linear = resolver.resolve(LINEAR, where, LinearDims(D=dims.D, O=dims.O))
    add = resolver.resolve(ALL_REDUCE_ADD, where, AllReduceAddDims(D=dims.O, ranks=dims.ranks, mapped=dims.mapped))
    return partial(separate.linear_reduce_add, linear=linear, add=add)


def _matrix_reduce_refuses(where: Where, dims: LinearReduceDims) -> Refusal:
    if not dims.mapped:
        return "needs ranks that map each other's memory"
    if dims.D % 8 or dims.O % 8 or not dims.D:
        return f"needs D and O to be multiples of 8, not {dims.D} and {dims.O}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    if reason := why_not(where) or cuda_build.why_not(where) or why_not_hopper():
        return reason
    from thalweg.ops.linear.matrix import reduce_refuses

    return reduce_refuses(dims.O, REDUCED.last or 0)


def _matrix_reduce(where: Where, dims: LinearReduceDims) -> LinearReduceAdd:
    from thalweg.ops.linear import matrix

    return matrix.linear_reduce_add


def _ggml(where: Where, dims: LinearGgmlDims) -> LinearGgml:
    scheme = GgmlRows.named(dims.scheme)
    assert scheme is not None
    return partial(reference.linear_ggml, scheme)


def _matrix_linear(where: Where, dims: LinearDims) -> Linear:
    from thalweg.ops.linear import matrix

    return matrix.linear


def _matrix_norm_linear(where: Where, dims: NormLinearDims) -> NormLinear:
    from thalweg.ops.linear import matrix

    return matrix.norm_linear


def _matrix_linear_add(where: Where, dims: LinearDims) -> LinearAdd:
    from thalweg.ops.linear import matrix

    return matrix.linear_add


def _cpp_ggml(where: Where, dims: LinearGgmlDims, *, rounds: bool = False, many: bool = False) -> LinearGgml:
    scheme = GgmlRows.named(dims.scheme)
    assert scheme is not None
    return blocks_cpp.BlockLinear(scheme, rounds=rounds, many=many)


def _cpp_ggml_refuses(where: Where, dims: LinearGgmlDims, *, rounds: bool = False) -> Refusal:
    scheme = GgmlRows.named(dims.scheme)
    assert scheme is not None
    return blocks_cpp.refusal(scheme, rounds=rounds) or cpu_build.why_not(where)


def _triton_norm_linear(where: Where, dims: NormLinearDims) -> NormLinear:
    from thalweg.ops.linear.triton import library

    return library.norm_linear


register(LINEAR, "reference", lambda *_: reference.linear)
register(LINEAR, "matrix", _matrix_linear, supports=_matrix_refuses, tokens=_some, priority=15)
register(LINEAR, "cpp", lambda *_: cpp.linear, supports=cpu_build.why_not, tokens=CPU_FEW, priority=10)
register(LINEAR, "panels", lambda *_: partial(cpp.linear, many=True), supports=cpu_build.why_not, priority=5)
register(LINEAR, "cuda", lambda *_: cuda.linear, supports=_cuda_refuses, tokens=_few, priority=20)

register(NORM_LINEAR, "reference", lambda *_: reference.norm_linear)
register(NORM_LINEAR, "separate", _separate, priority=-10, recordable=False)
register(NORM_LINEAR, "cpp", lambda *_: cpp.norm_linear, supports=cpu_build.why_not, tokens=CPU_FEW, priority=10)
register(NORM_LINEAR, "panels", lambda *_: partial(cpp.norm_linear, many=True), supports=cpu_build.why_not, priority=5)
register(NORM_LINEAR, "triton", _triton_norm_linear, supports=why_not, priority=10)
register(NORM_LINEAR, "matrix", _matrix_norm_linear, supports=_matrix_refuses, tokens=_some, priority=15)
register(NORM_LINEAR, "splits", _splits_norm_linear, supports=_splits_refuses, tokens=SPLIT_TOKENS, priority=16)
register(NORM_LINEAR, "cuda", lambda *_: cuda.norm_linear, supports=_cuda_refuses, tokens=_norm_few, priority=20)

register(LINEAR_ADD, "reference", lambda *_: reference.linear_add)
register(LINEAR_ADD, "in_place", lambda *_: reference.linear_add_in_place, supports=_in_place_refuses, priority=10)
register(LINEAR_ADD, "matrix", _matrix_linear_add, supports=_matrix_refuses, tokens=_some, priority=15)
register(LINEAR_ADD, "cpp", lambda *_: cpp.linear_add, supports=cpu_build.why_not, tokens=CPU_FEW, priority=10)
register(LINEAR_ADD, "panels", lambda *_: partial(cpp.linear_add, many=True), supports=cpu_build.why_not, priority=5)
register(LINEAR_ADD, "cuda", lambda *_: cuda.linear_add, supports=_cuda_refuses, tokens=_few, priority=20)

register(LINEAR_REDUCE_ADD, "reference", lambda *_: reference.linear_reduce_add)
register(LINEAR_REDUCE_ADD, "separate", _reduce_separate, priority=10)
register(LINEAR_REDUCE_ADD, "matrix", _matrix_reduce, supports=_matrix_reduce_refuses, tokens=REDUCED, priority=15)
register(
    LINEAR_REDUCE_ADD, "cuda", lambda *_: cuda.linear_reduce_add, supports=_reduce_refuses, tokens=_few, priority=20
)

register(LINEAR_GGML, "reference", _ggml, capturable=False)
register(LINEAR_GGML, "cpp", _cpp_ggml, supports=_cpp_ggml_refuses, tokens=CPU_FEW, priority=10)
register(LINEAR_GGML, "panels", partial(_cpp_ggml, many=True), supports=_cpp_ggml_refuses, priority=5)
_int8: dict[str, Any] = {"supports": partial(_cpp_ggml_refuses, rounds=True), "rounding": 0.02}
register(LINEAR_GGML, "int8", partial(_cpp_ggml, rounds=True), tokens=CPU_FEW, priority=20, **_int8)
register(LINEAR_GGML, "int8_panels", partial(_cpp_ggml, rounds=True, many=True), priority=15, **_int8)
