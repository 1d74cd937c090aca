"""Op "experts": the experts' SwiGLU networks with the sum that ends them, over weights that carry their scheme.

Nine forms on a GPU, by how many tokens share an expert: pairs and tiles for decode, sorted pairs for prompts (all in
Triton, for the schemes of SCHEMES), products in CUDA C++ for a few tokens over fp8 and int4 ("cuda") and for batches
over int4 ("batch"), and, for prompts on Hopper, products of sorted pairs at the rate of the matrix unit: in bf16 and
over int4 ("matrix"), and over fp8, for which activations are quantized ("w8a8"), as in tiles of a batch, narrow
("tiles_w8a8") or wide ("joined_w8a8").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.moe.experts import reference
from thalweg.ops.norm import NextNorm
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
from thalweg.ops.toolchain import cpu_build, cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper
from thalweg.quant import scheme_named
from thalweg.quant.blocks import BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsDims:
    E: int  # all experts, shared ones included
    D: int
    I: int  # width of an expert
    scheme: str = "none"  # of the weights: a name of thalweg.quant, or two, of gate_up | down, if they differ
    own: int = 0  # width of the own expert, which is not among E; 0 if there is none


class Finish(Protocol):
    def __call__(
        self,
        parts_PD: Tensor,
        /,
        *,
        weights_Tk: Tensor | None = None,
        own_TD: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Something of the experts' sum y [T, D], which is given whole, or as outputs [T * k, D] of the pairs, in fp32
        or x's dtype, and what a form would make y of (op "all_reduce_add")."""


class Experts(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        gate_up: tuple[Tensor, ...],
        down: tuple[Tensor, ...],
        *,
        residual_TD: Tensor | None = None,
        num_shared: int = 0,
        own: tuple[Tensor, Tensor] | None = None,
        scale: float = 1.0,
        finish: Finish | None = None,
        next_norm: NextNorm | None = None,
    ) -> Tensor:
        """y_TD = sum over a token's k experts of weight * (silu(x @ gate.T) * (x @ up.T)) @ down.T, plus the residual.

        gate_up and down are the tensors that the scheme's `stored` lists, in its order: of [E, 2I, D], gate, then up,
        as two parts, and of [E, D, I]. x and residual share one dtype, which y has too, and weights without a scheme;
        weights_Tk is fp32 and the sum over experts is in fp32. Whether it is rounded to the dtype before the residual
        is added is open. No input is changed.

        x and residual have a unit last stride and any row stride; the other inputs are contiguous. Cost grows with
        T * k alone. A token's experts differ. num_shared promises that the last num_shared ids of every token are
        E - num_shared .. E - 1, as "norm_router" gives them: kernels then start on those before it is done.

        own is one more expert that every token takes, with weight 1 and plain weights in x's dtype, of any width:
        gate_up [2 * dims.own, D] and down [D, dims.own]. Then y = residual + (own expert + scale * the others' sum),
        and the arithmetic is that of the parts by themselves: what each of the two gives is rounded to the dtype, and
        from there on as in op "scaled_residual_add". Without it scale is 1.

        finish is called instead of the sum that ends it, and its result returned; there is no residual then, and no
        next_norm, which is of y. Ids may then be -1, with weight 0: such a pair is left out, no weights are read for
        it, and what finish is given for it may be anything. (Kernels for a CPU refuse that: only steps of
        data-parallel ranks on GPUs have such pairs.)

        "fp8": (q float8_e4m3fn, scales fp32), and a weight is w = q * the scale of its block of 128 x 128. Scales of
        down are [E, ceil(D / 128), ceil(I / 128)], those of gate_up [E, 2 ceil(I / 128), ceil(D / 128)], whose halves
        belong to gate and up: where 128 does not divide I, up's first block begins at its first row. Whether
        activations are quantized is open in bf16, each row with a scale of its own; they are not in fp32. A scale is
        any normal number above zero. If it is a power of two, w is exact in every dtype; or else it is open whether the
        scale and w are each rounded to x's dtype, or fp16, before the product, or not at all.

        "int4": (words int32, scales in x's dtype), and a weight is w = (nibble - 8) * the scale of its group of 32
        columns. Words are [E, 2I, D / 8] and [E, D, I / 8], eight elements of a row in each, the first in the lowest
        bits; scales [E, 2I, ceil(D / 32)] and [E, D, ceil(I / 32)]. Rounding to x's dtype is open as for "fp8".

        "ggml ...": (blocks uint8 [E, bytes],), rows of GGML's blocks in the types that the name lists. Whether
        activations are rounded to 8 bits, in blocks of 32 or 256 with a scale each, is open.
        """


EXPERTS: Op[ExpertsDims, Experts] = Op("experts", ExpertsDims)

MAX_WIDTH = 16384  # with fp8, one program holds a token's row in registers
MANY_EXPERTS = 384  # of which each has few tokens still where fewer experts would have many
MAX_CUDA_EXPERTS = 1024  # a block of the CUDA C++ kernels has all of them in shared memory
MAX_SORTED_EXPERTS = 1280  # of which a block of the sort has counts in shared memory, for each of its warps
FEWEST_W8A8 = 17  # tokens of a decode step from which on activations are quantized: fewer stay as they are
NARROWEST, WIDEST = 512, 1024  # width of experts that "tiles_w8a8" has been timed for
# From how many rows and columns of an expert on finding pairs and quantizing x is little beside streaming its weights.
JOINED_WIDTH, JOINED_COLUMNS, JOINED_TOKENS = 2048, 4096, 64
MAX_CUDA_WARPS = 12
CPU_FEW = Tokens(last=64)  # beyond, an expert has so many tokens that the library's products are faster
INT4_COLUMNS, MAX_INT4_COLUMNS, MAX_INT4_TOKENS = 256, 7168, 64  # of a warp, and of as many as registers allow
# Rows beyond which the experts of Kimi-K2 have more tokens than a tile of "batch". Pairs of other ranks' experts may be
# left out, so it is not the number of experts here that says how many of the rows one has.
MAX_INT4_BATCH = 2560
WIDE_STEPS, MAX_WIDE_WARPS = 4, 14  # over fp8, for up to 8 tokens: more would not fit the registers


@dataclass(frozen=True, slots=True)
class Most:
    """Up to how many tokens forms serve; 0 for a form that has no loader for the scheme."""

    pairs: int
    tiles: int


SCHEMES = {"none": Most(pairs=2, tiles=192), "fp8": Most(pairs=4, tiles=192), "int4": Most(pairs=0, tiles=512)}
"""Those that the kernels in Triton have a tile loader for."""


def _triton_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.scheme not in SCHEMES:
        return f"needs weights in scheme {' or '.join(SCHEMES)}, not {dims.scheme}"
    if dims.scheme != "none" and dims.D > MAX_WIDTH:
        return f"needs rows of at most {MAX_WIDTH}, not {dims.D}"
    return why_not(where)


def _pairs_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.scheme in SCHEMES and not SCHEMES[dims.scheme].pairs:
        return f"has no loader for weights in scheme {dims.scheme}"
    if dims.own:
        return "has no programs for an expert of its own"
    return _triton_refuses(where, dims)


def steps_per_warp(columns: int) -> int | None:
    """Blocks of 128 columns for a warp in CUDA C++ over fp8, as few as MAX_CUDA_WARPS allow; WIDE_STEPS if up to
    MAX_WIDE_WARPS then suffice; None for more, or a rest."""
    blocks, rest = divmod(columns, BLOCK)
    fitting = [steps for steps in (1, 2) if blocks % steps == 0 and blocks <= steps * MAX_CUDA_WARPS]
    if blocks % WIDE_STEPS == 0 and blocks <= WIDE_STEPS * MAX_WIDE_WARPS:
        fitting.append(WIDE_STEPS)
    return fitting[0] if fitting and blocks and not rest else None


def _cuda_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.scheme == "int4":
        return _int4_refuses(dims) or _no_cuda(where) or why_not_hopper()
    if dims.scheme != "fp8":
        return f"needs weights in scheme fp8 or int4, not {dims.scheme}"
    if dims.own:
        return "has no products for an expert of its own"
    if dims.E > MAX_CUDA_EXPERTS:
        return f"needs at most {MAX_CUDA_EXPERTS} experts, not {dims.E}"
    if steps_per_warp(dims.D) is None or steps_per_warp(dims.I) is None:
        most = "up to 12, an even number up to 24 or four times up to 14, times 128"
        return f"needs D and I of {most}, not {dims.D} and {dims.I}"
    return _no_cuda(where)


def _int4_refuses(dims: ExpertsDims) -> Refusal:
    if dims.own not in (0, dims.I):
        return f"needs an own expert as wide as the others, {dims.I}, not {dims.own}"
    if dims.E > MAX_CUDA_EXPERTS:
        return f"needs at most {MAX_CUDA_EXPERTS} experts, not {dims.E}"
    if any(n % INT4_COLUMNS or not 0 < n <= MAX_INT4_COLUMNS for n in (dims.D, dims.I)):
        return f"needs D and I of a multiple of {INT4_COLUMNS} up to {MAX_INT4_COLUMNS}, not {dims.D} and {dims.I}"
    return None


def _no_cuda(where: Where) -> Refusal:
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return cuda_build.why_not(where) or why_not(where)


def _matrix_refuses(where: Where, dims: ExpertsDims, scheme: str, columns: int) -> Refusal:
    if dims.E > MAX_SORTED_EXPERTS:
        return f"needs at most {MAX_SORTED_EXPERTS} experts, not {dims.E}"
    if scheme == "none" and dims.scheme == "int4":
        if dims.D % 256 or dims.I % 128 or not dims.D or not dims.I:
            return f"needs D to be a multiple of 256 and I of 128, not {dims.D} and {dims.I}"
        return _no_cuda(where) or why_not_hopper()
    if dims.scheme != scheme:
        return f"needs weights in scheme {scheme}{' or int4' if scheme == 'none' else ''}, not {dims.scheme}"
    if dims.D % columns or dims.I % columns or not dims.D or not dims.I:
        return f"needs D and I to be multiples of {columns}, not {dims.D} and {dims.I}"
    return _no_cuda(where) or why_not_hopper()


def _without_norm(form: Callable[..., Tensor]) -> Experts:
    """A form that does not compute the next norm."""

    def experts(*inputs: Any, next_norm: NextNorm | None = None, **others: Any) -> Tensor:
        return form(*inputs, **others)

    return experts


def _finishing(form: Callable[..., Tensor]) -> Experts:
    """A form that gives no outputs of pairs, with a `finish` of its whole sum."""

    def experts(
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        gate_up: tuple[Tensor, ...],
        down: tuple[Tensor, ...],
        *,
        finish: Finish | None = None,
        **others: Any,
    ) -> Tensor:
        y_TD = form(x_TD, weights_Tk, ids_Tk, gate_up, down, **others)
        return y_TD if finish is None else finish(y_TD)

    return experts


def _batch_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.scheme != "int4":
        return f"needs weights in scheme int4, not {dims.scheme}"
    if dims.E > MAX_SORTED_EXPERTS:
        return f"needs at most {MAX_SORTED_EXPERTS} experts, not {dims.E}"
    if dims.D % 256 or dims.I % 256 or not dims.D or not dims.I:
        return f"needs D and I to be multiples of 256, not {dims.D} and {dims.I}"
    return _no_cuda(where) or why_not_hopper()


def _narrow_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.own:
        return "has no programs for an expert of its own"
    if dims.E >= MANY_EXPERTS or not NARROWEST <= dims.I <= WIDEST:
        return f"needs fewer than {MANY_EXPERTS} experts, {NARROWEST} to {WIDEST} wide, not {dims.E} and {dims.I}"
    return _matrix_refuses(where, dims, scheme="fp8", columns=BLOCK)


def _joined_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.own:
        return "has no programs for an expert of its own"
    if dims.I < JOINED_WIDTH or dims.D < JOINED_COLUMNS:
        return f"needs experts {JOINED_WIDTH} wide of {JOINED_COLUMNS} columns or more, not {dims.I} of {dims.D}"
    return _matrix_refuses(where, dims, scheme="fp8", columns=BLOCK)


def _reference(where: Where, dims: ExpertsDims) -> Experts:
    schemes = [scheme_named(name) for name in dims.scheme.split(" | ")]
    return _without_norm(_finishing(partial(reference.experts, schemes[0], down_scheme=schemes[-1])))


def _grouped(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.experts.triton import grouped

    return grouped.experts_of_groups


def _matrix(where: Where, dims: ExpertsDims) -> Experts:
    if dims.scheme == "int4":
        from thalweg.ops.moe.experts import matrix_int4

        return matrix_int4.experts
    from thalweg.ops.moe.experts import matrix

    return matrix.experts


def _batch(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.experts import batch_int4

    return batch_int4.experts


def _tiles(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.experts.triton import tiles

    return tiles.experts_of_tiles


def _narrow(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.experts.triton import narrow

    return narrow.experts


def _joined(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.experts.triton import joined

    return _without_norm(joined.experts)


def _pairs(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.experts.triton import pairs

    return _without_norm(pairs.experts_of_pairs)


def _cuda(where: Where, dims: ExpertsDims) -> Experts:
    if dims.scheme == "int4":
        from thalweg.ops.moe.experts import cuda_int4

        return _without_norm(cuda_int4.experts)
    from thalweg.ops.moe.experts import cuda_fp8

    return _without_norm(cuda_fp8.experts)


def _few(dims: ExpertsDims) -> Tokens:
    return Tokens(last=SCHEMES[dims.scheme].pairs)


def _fewer(dims: ExpertsDims) -> Tokens:
    if dims.scheme == "int4":
        return Tokens(last=MAX_INT4_TOKENS)
    return Tokens(last=8 if WIDE_STEPS in (steps_per_warp(dims.D), steps_per_warp(dims.I)) else 16)


def _some(dims: ExpertsDims) -> Tokens:
    most = SCHEMES[dims.scheme].tiles
    return Tokens(last=min(512, 2 * most) if dims.E >= MANY_EXPERTS else most)


def _some_w8a8(dims: ExpertsDims) -> Tokens:
    return Tokens(FEWEST_W8A8, SCHEMES["fp8"].tiles)


def _cpp(where: Where, dims: ExpertsDims, *, rounds: bool = False, many: bool = False) -> Experts:
    from thalweg.ops.moe.experts import cpp

    return _without_norm(_finishing(cpp.build(dims, rounds=rounds, many=many)))


def _cpp_refuses(where: Where, dims: ExpertsDims, *, rounds: bool = False) -> Refusal:
    from thalweg.ops.moe.experts import cpp

    return cpp.refuses(dims, rounds=rounds) or cpu_build.why_not(where)


def _int8_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.scheme == "none":
        return "needs weights in GGML's blocks"
    return _cpp_refuses(where, dims, rounds=True)


def _prompts(dims: ExpertsDims) -> Tokens:
    return Tokens(first=MAX_INT4_BATCH + 1) if dims.scheme == "int4" else Tokens()


def _separate(where: Where, dims: ExpertsDims) -> Experts:
    from thalweg.ops.moe.experts import separate

    return _without_norm(_finishing(separate.build(where, dims)))


def _separate_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    return None if dims.own else "needs an expert of its own, or there is nothing to separate"


register(EXPERTS, "reference", _reference, capturable=False)
register(EXPERTS, "separate", _separate, supports=_separate_refuses, priority=-10)
register(EXPERTS, "cpp", _cpp, supports=_cpp_refuses, tokens=CPU_FEW, priority=10)
register(EXPERTS, "panels", partial(_cpp, many=True), supports=_cpp_refuses, priority=5)
_int8: dict[str, Any] = {"supports": _int8_refuses, "rounding": 0.03}
register(EXPERTS, "int8", partial(_cpp, rounds=True), tokens=CPU_FEW, priority=20, **_int8)
register(EXPERTS, "int8_panels", partial(_cpp, rounds=True, many=True), priority=15, **_int8)
register(EXPERTS, "grouped", _grouped, supports=_triton_refuses, priority=10)
_matrix_supports = partial(_matrix_refuses, scheme="none", columns=64)
register(EXPERTS, "matrix", _matrix, supports=_matrix_supports, tokens=_prompts, priority=15)
_w8a8_refuses = partial(_matrix_refuses, scheme="fp8", columns=BLOCK)
register(EXPERTS, "w8a8", _matrix, supports=_w8a8_refuses, priority=15, rounding=0.06)
register(EXPERTS, "tiles_w8a8", _narrow, supports=_narrow_refuses, tokens=_some_w8a8, priority=25, rounding=0.06)
_joined_tokens = Tokens(FEWEST_W8A8, JOINED_TOKENS)
register(EXPERTS, "joined_w8a8", _joined, supports=_joined_refuses, tokens=_joined_tokens, priority=27, rounding=0.06)
register(EXPERTS, "tiles", _tiles, supports=_triton_refuses, tokens=_some, priority=20)
register(EXPERTS, "batch", _batch, supports=_batch_refuses, tokens=Tokens(last=MAX_INT4_BATCH), priority=25)
register(EXPERTS, "pairs", _pairs, supports=_pairs_refuses, tokens=_few, priority=30)
register(EXPERTS, "cuda", _cuda, supports=_cuda_refuses, tokens=_fewer, priority=40)
