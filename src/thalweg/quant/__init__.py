"""How weights are stored when not in the model's dtype. One object per scheme; layers, weight plans, cost and `inspect`
ask it, and nobody else knows a scheme by name. Importing this needs no torch."""

from __future__ import annotations

from thalweg.quant.fp8 import Fp8Blocks, Fp8Rows
from thalweg.quant.ggml import GgmlRows
from thalweg.quant.int4 import Int4Groups
from thalweg.quant.scheme import PLAIN, Scheme

__all__ = ["FP8_EXPERTS", "FP8_LINEARS", "INT4_EXPERTS", "PLAIN", "QUANTIZATIONS", "GgmlRows", "Scheme", "scheme_named"]

FP8_EXPERTS: Scheme = Fp8Blocks()
FP8_LINEARS: Scheme = Fp8Rows()
INT4_EXPERTS: Scheme = Int4Groups()

_SCHEMES: tuple[Scheme, ...] = (FP8_EXPERTS,)

QUANTIZATIONS = tuple(scheme.name for scheme in _SCHEMES)
"""What --quantization takes."""


def scheme_named(name: str | None) -> Scheme:
    """The scheme that --quantization or an op's dims name; None is the model's own dtype. Raises KeyError for another
    name."""
    if name is not None and (rows := GgmlRows.named(name)) is not None:
        return rows
    return PLAIN if name is None else {scheme.name: scheme for scheme in (PLAIN, *_SCHEMES, INT4_EXPERTS)}[name]
