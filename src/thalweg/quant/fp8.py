"""Scheme "fp8": float8_e4m3fn with one float32 scale for each block of 128 x 128, quantized as weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thalweg.quant.blocks import BLOCK, blocks
from thalweg.quant.scheme import Index, Shape, Stored, tensor_index

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Fp8Blocks:
    """Weights [E, O, D] of experts. Every part (gate, up) has blocks of its own, counted from its first row."""

    name, file_dtype, packed, as_stored, rate = "fp8", "F8_E4M3", 1, False, 2.0

    def bytes_per_weight(self, model_bytes: int) -> float:
        return 1 + 4 / BLOCK**2

    def stored(self, shape: Shape, parts: int) -> tuple[Stored, ...]:
        experts, rows, cols = shape
        scales = (experts, parts * blocks(rows // parts), blocks(cols))
        return Stored("", shape, "float8_e4m3fn"), Stored("_scale", scales, "float32")

    def put(self, part: Tensor, into: tuple[Index, ...], stored: Sequence[Tensor]) -> None:
        """The part is moved first and quantized where it is stored: no more than one part at a time is there in
        another precision."""
        from thalweg.quant.fp8_blocks import quantize

        weight, scales = stored
        if into and isinstance(into[0], tuple):  # a stack of experts
            first, last = into[0]
            for e in range(first, last):
                self.put(part[e - first], (e, *into[1:]), stored)
            return
        place = weight[tensor_index(into)]
        q, s = quantize(part.reshape(place.shape).to(place.device))
        place.copy_(q)
        scales[tensor_index(scales_into(into))].copy_(s)

    def rows_of(self, stored: Sequence[Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("vocabularies are kept in the model's dtype")

    def widened(self, stored: Sequence[Tensor], parts: int, dtype: torch.dtype) -> Tensor:
        from thalweg.quant.fp8_blocks import dequantize

        weight, scales = (t.unflatten(-2, (parts, -1)) for t in stored)
        return dequantize(weight, scales, dtype).flatten(-3, -2)


def scales_into(into: tuple[Index, ...]) -> tuple[Index, ...]:
    """Where the scales of a part stand: a range of rows is one of several equally high parts below one another."""
    *entries, last = into
    if isinstance(last, int):
        return into
    start, stop = last
    height = blocks(stop - start)
    first = start // (stop - start) * height
    return (*entries, (first, first + height))


class Fp8Rows:
    """Weights [O, D] of linears as checkpoints store them in float8: for every row and 128 columns one float32 scale.

    Checkpoints have one for 128 rows as well. Repeating it costs 3 % of the weight's bytes and lets matrices be fused
    and cut between any rows.
    """

    name, file_dtype, packed, as_stored, rate = "fp8_rows", "F8_E4M3", 1, False, 2.0

    def bytes_per_weight(self, model_bytes: int) -> float:
        return 1 + 4 / BLOCK

    def stored(self, shape: Shape, parts: int) -> tuple[Stored, ...]:
        rows, cols = shape
        return Stored("", shape, "float8_e4m3fn"), Stored("_scale", (rows, blocks(cols)), "float32")

    def put(self, part: Tensor, into: tuple[Index, ...], stored: Sequence[Tensor]) -> None:
        raise NotImplementedError("linears are not quantized as they are loaded, only taken as a checkpoint has them")

    def rows_of(self, stored: Sequence[Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("vocabularies are kept in the model's dtype")

    def widened(self, stored: Sequence[Tensor], parts: int, dtype: torch.dtype) -> Tensor:
        weight, scales = stored
        by_column = scales.repeat_interleave(BLOCK, -1)[..., : weight.shape[-1]]
        return (weight.float() * by_column).to(dtype)
