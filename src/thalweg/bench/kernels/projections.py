"""Cases of the projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thalweg.bench.kernels.case import Arguments, Case, Draw, Setting, candidates_of
from thalweg.ops.embedding import VOCAB_ROWS, VocabRowsDims
from thalweg.ops.linear import (
    LINEAR,
    LINEAR_ADD,
    LINEAR_GGML,
    NORM_LINEAR,
    LinearDims,
    LinearGgmlDims,
    NormLinearDims,
)
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, LINEAR_FP8, NORM_LINEAR_FP8, Fp8LinearDims
from thalweg.ops.projection import BATCHED_PROJECTION, BatchedProjectionDims
from thalweg.ops.registry import Op
from thalweg.ops.swiglu import NORM_SWIGLU, NormSwigluDims
from thalweg.quant import FP8_LINEARS, PLAIN, GgmlRows, scheme_named
from thalweg.quant.scheme import Shape

EPS = 1e-5


def linear(setting: Setting, dims: LinearDims) -> Iterator[Case]:
    """In the model's dtype; of prompts also in float8, whatever the model has. The other two likewise."""

    def make(draw: Draw, T: int) -> Arguments:
        return Arguments(draw(T, dims.D), draw(dims.O, dims.D, scale=dims.D**-0.5))

    yield from _products(setting, LINEAR, dims, dims.D, dims.O, f"{dims.D} to {dims.O}", make)
    if setting.prompts:
        yield from linear_fp8(setting, Fp8LinearDims(D=dims.D, O=dims.O))


def linear_add(setting: Setting, dims: LinearDims) -> Iterator[Case]:
    def make(draw: Draw, T: int) -> Arguments:
        return Arguments(draw(T, dims.D), draw(dims.O, dims.D, scale=dims.D**-0.5), draw(T, dims.O))

    yield from _products(setting, LINEAR_ADD, dims, dims.D, dims.O, f"{dims.D} to {dims.O}", make, results=2)
    if setting.prompts:
        yield from linear_add_fp8(setting, Fp8LinearDims(D=dims.D, O=dims.O))


def norm_linear(setting: Setting, dims: NormLinearDims) -> Iterator[Case]:
    O, norm_dtype = sum(dims.parts), torch.float32 if dims.norm_fp32 else None

    def make(draw: Draw, T: int) -> Arguments:
        norm = draw(dims.D, scale=0.1, dtype=norm_dtype).add_(1)
        return Arguments(draw(T, dims.D), norm, EPS, draw(O, dims.D, scale=dims.D**-0.5))

    parts = f" ({' + '.join(map(str, dims.parts))})" if len(dims.parts) > 1 else ""
    yield from _products(setting, NORM_LINEAR, dims, dims.D, O, f"{dims.D} to {O}{parts}", make)
    if setting.prompts:
        yield from norm_linear_fp8(setting, Fp8LinearDims(D=dims.D, O=O))


def norm_swiglu(setting: Setting, dims: NormSwigluDims) -> Iterator[Case]:
    norm_dtype = torch.float32 if dims.norm_fp32 else None

    def make(draw: Draw, T: int) -> Arguments:
        norm = draw(dims.D, scale=0.1, dtype=norm_dtype).add_(1)
        return Arguments(draw(T, dims.D), norm, EPS, draw(2 * dims.I, dims.D, scale=dims.D**-0.5))

    yield from _products(setting, NORM_SWIGLU, dims, dims.D, 2 * dims.I, f"{dims.D} to {dims.I}, gated", make)
    if setting.prompts:
        yield from norm_linear_fp8(setting, Fp8LinearDims(D=dims.D, O=2 * dims.I))


def linear_fp8(setting: Setting, dims: Fp8LinearDims) -> Iterator[Case]:
    def make(draw: Draw, T: int) -> Arguments:
        return Arguments(draw(T, dims.D), *fp8_weight(draw, dims))

    yield from _fp8_products(setting, LINEAR_FP8, dims, make)


def norm_linear_fp8(setting: Setting, dims: Fp8LinearDims) -> Iterator[Case]:
    def make(draw: Draw, T: int) -> Arguments:
        return Arguments(draw(T, dims.D), draw(dims.D, scale=0.1).add_(1), EPS, *fp8_weight(draw, dims))

    yield from _fp8_products(setting, NORM_LINEAR_FP8, dims, make)


def linear_add_fp8(setting: Setting, dims: Fp8LinearDims) -> Iterator[Case]:
    def make(draw: Draw, T: int) -> Arguments:
        return Arguments(draw(T, dims.D), *fp8_weight(draw, dims), draw(T, dims.O))

    yield from _fp8_products(setting, LINEAR_ADD_FP8, dims, make, results=2)


def fp8_weight(draw: Draw, dims: Fp8LinearDims) -> list[Tensor]:
    """Float8 and scales, as the scheme stores them, and the rest if there is one."""
    q, scale = FP8_LINEARS.stored((dims.O, dims.D), 1)
    weight = [draw(*q.shape).to(getattr(torch, q.dtype)), draw(*scale.shape, dtype=torch.float32).abs_().add_(0.1)]
    return weight + ([draw(dims.rest, dims.D)] if dims.rest else [])


def _fp8_products(
    setting: Setting, op: Op[Any, Any], dims: Fp8LinearDims, arguments: Any, results: int = 1
) -> Iterator[Case]:
    es, rows = setting.dtype.itemsize, dims.O + dims.rest
    label = f"{dims.D} to {dims.O}" + (f" + {dims.rest}" if dims.rest else "")
    weight_bytes = (FP8_LINEARS.bytes_per_weight(es) * dims.O + es * dims.rest) / rows
    rate = FP8_LINEARS.rate if setting.prompts else 1.0
    yield from _products(setting, op, dims, dims.D, rows, label, arguments, results, weight_bytes, rate)


def linear_ggml(setting: Setting, dims: LinearGgmlDims) -> Iterator[Case]:
    scheme = scheme_named(dims.scheme)
    (blocks,) = scheme.stored((dims.O, dims.D), 1)

    def make(draw: Draw, T: int) -> Arguments:
        return Arguments(draw(T, dims.D), _blocks(draw, blocks.shape))

    label, weight_bytes = f"{dims.D} to {dims.O}", scheme.bytes_per_weight(setting.dtype.itemsize)
    yield from _products(setting, LINEAR_GGML, dims, dims.D, dims.O, label, make, weight_bytes=weight_bytes)


def vocab_rows(setting: Setting, dims: VocabRowsDims) -> Iterator[Case]:
    V, scheme, es = 4096, scheme_named(dims.scheme), setting.dtype.itemsize
    if isinstance(scheme, GgmlRows):
        scheme = GgmlRows(((scheme.segments[0][0], V),))
    (rows,) = scheme.stored((V, dims.D), 1)
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            ids = draw(T, dtype=torch.float32).mul_(V / 8).long() % V
            return Arguments(ids, draw(*rows.shape) if scheme is PLAIN else _blocks(draw, rows.shape))

        yield Case(
            VOCAB_ROWS.name,
            f"rows of {dims.D}, {size}",
            candidates_of(setting, VOCAB_ROWS, replace(dims, scheme=scheme.name), T),
            make,
            num_bytes=T * dims.D * (es + scheme.bytes_per_weight(es)),
            timed=setting.timed,
        )


def _blocks(draw: Draw, shape: Shape) -> Tensor:
    """Bytes below 64 are not part of a float16 that is infinite or NaN."""
    return draw(*shape, dtype=torch.float32).mul_(16).abs_().clamp_(max=63).to(torch.uint8)


def _products(
    setting: Setting,
    op: Op[Any, Any],
    dims: Any,
    D: int,
    O: int,
    label: str,
    arguments: Any,
    results: int = 1,
    weight_bytes: float | None = None,
    rate: float = 1.0,
) -> Iterator[Case]:
    es = setting.dtype.itemsize
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            found: Arguments = arguments(Draw(setting, copy), T)
            return found

        yield Case(
            op.name,
            f"{label}, {size}",
            candidates_of(setting, op, dims, T),
            make,
            num_bytes=es * (T * D + results * T * O) + (es if weight_bytes is None else weight_bytes) * O * D,
            flops=2 * T * D * O,
            rate=rate,
            timed=setting.timed,
        )


def batched_projection(setting: Setting, dims: BatchedProjectionDims) -> Iterator[Case]:
    R, O = dims.R, dims.O
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(T, 2, R), draw(2, O, R, scale=R**-0.5))

        yield Case(
            BATCHED_PROJECTION.name,
            f"2 x {R} to {O}, {size}",
            candidates_of(setting, BATCHED_PROJECTION, dims, T),
            make,
            num_bytes=2 * setting.dtype.itemsize * (T * R + O * R + T * O),
            flops=4 * T * R * O,
            timed=setting.timed,
        )
