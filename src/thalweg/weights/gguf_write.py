"""A checkpoint's tensors as a GGUF file's: brought into its order, and quantised as an --outtype says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from thalweg.config.gguf.write import NewTensor
from thalweg.quant.ggml_quantize import quantize
from thalweg.quant.ggml_types import TYPES, GgmlType
from thalweg.quant.scheme import Range, Shape
from thalweg.weights.gguf_names import GgufNames, Held

OUTTYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q4_k_m": 15}
"""What --outtype takes, with the number that general.file_type has for it."""

_KEPT = ("norm", "ffn_gate_inp", "ssm_conv1d", "ssm_a", "ssm_dt", "exp_probs_b")  # never quantised, in no type but F32
_SMALLER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_K": "Q8_0"}  # where 256 does not divide a row
_CHUNK = 1 << 24  # elements that are quantised at a time

Read = Callable[[str], Tensor]


def new_tensors(names: GgufNames, read: Read, outtype: str, *, layers: int, tied: bool) -> Iterator[NewTensor]:
    """The tensors of a file in order; `read` gives a checkpoint's by name, as plain numbers. Each is made when its
    content is asked for."""
    uses: dict[str, list[str]] = defaultdict(list)
    for theirs, held in names.held.items():
        for gguf in dict.fromkeys(piece.name for piece in held.pieces):
            uses[gguf].append(theirs)
    for gguf, sources in uses.items():
        shape = names.shapes[gguf]
        kind = type_of(gguf, shape, outtype, layers=layers, tied=tied)
        held_by = {theirs: names.held[theirs] for theirs in sources}
        yield NewTensor(gguf, kind, shape, _content(gguf, kind, shape, held_by, read))


def type_of(name: str, shape: Shape, outtype: str, *, layers: int, tied: bool) -> GgmlType:
    """The type of a tensor, as llama.cpp's own mixes have it."""
    columns = shape[-1]
    if prod(shape) == max(shape) or any(part in name for part in _KEPT):
        return TYPES["F32"]
    if outtype in ("f32", "f16", "bf16"):
        return TYPES[outtype.upper()]
    wanted = {"q8_0": "Q8_0", "q6_k": "Q6_K", "q4_k_m": "Q4_K"}[outtype]
    if outtype == "q4_k_m":
        wanted = _in_q4_k_m(name, layers, tied)
    if columns % TYPES[wanted].elements:
        wanted = _SMALLER.get(wanted, wanted)
    return TYPES["F16" if columns % TYPES[wanted].elements else wanted]


def _in_q4_k_m(name: str, layers: int, tied: bool) -> str:
    """The head, and values and down-projections of every third layer, more at both ends, have more bits."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    if "attn_qkv" in name:
        return "Q5_K"
    if ".attn_v.weight" in name or "ffn_down" in name:
        layer = int(name.split(".")[1])
        eighth = layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return "Q6_K"
    return "Q4_K"


def _content(gguf: str, kind: GgmlType, shape: Shape, held_by: dict[str, Held], read: Read) -> Callable[[], memoryview]:
    columns = shape[-1] if len(shape) > 1 else 1
    rows = prod(shape) // columns

    def make() -> memoryview:
        if kind.is_plain and columns == 1:
            out = torch.empty(rows, kind.bytes, dtype=torch.uint8)
        else:
            out = torch.empty(rows, kind.row_bytes(columns), dtype=torch.uint8)
        for theirs, held in held_by.items():
            if held.by_column:
                whole, values = torch.empty(rows, columns), read(theirs).float().reshape(rows, columns)
                for (start, stop), (first, last) in _places(gguf, held, columns):
                    whole[:, start:stop] = values[:, first:last]
                _quantize_into(out, whole, kind)
                continue
            values = _as_held(read(theirs), held, gguf, shape).reshape(-1, columns)
            if held.change == "latent_up":
                _quantize_into(out, values, kind)
                continue
            for (start, stop), (first, last) in _places(gguf, held, rows):
                _quantize_into(out[start:stop], values[first:last], kind)
        return out.view(-1).numpy().data

    return make


def _places(gguf: str, held: Held, size: int) -> Iterator[tuple[Range, Range]]:
    """(where in the file's tensor, where in the checkpoint's) of each piece in `gguf`."""
    at = 0
    for piece in held.pieces:
        start, stop = piece.part or (0, size)
        if piece.name == gguf:
            yield (start, stop), (at, at + stop - start)
        at += stop - start


def _as_held(values: Tensor, held: Held, gguf: str, shape: Shape) -> Tensor:
    """A checkpoint's numbers as the file has them."""
    if held.change == "shifted":
        return values.float() + 1
    if held.change == "decay":
        return -values.float().exp()
    if held.change == "latent_up":
        is_key = gguf == held.pieces[0].name
        heads, rank = shape[0], held.shape[-1]
        width = shape[2] if is_key else shape[1]
        per_head = values.reshape(heads, -1, rank)
        return per_head[:, :width].transpose(1, 2).contiguous() if is_key else per_head[:, -width:].contiguous()
    return values


def _quantize_into(out: Tensor, values: Tensor, kind: GgmlType) -> None:
    step = max(1, _CHUNK // values.shape[1])
    for first in range(0, len(values), step):
        out[first : first + step] = quantize(values[first : first + step], kind)
