"""A GGUF model as a checkpoint: tensors under the names that its family's checkpoints give them, read from the mapped
files and brought into a checkpoint's order."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from thalweg.config.gguf.file import GgufFile, GgufTensor
from thalweg.config.gguf.model import GgufModel
from thalweg.errors import CheckpointError
from thalweg.quant.ggml import Tile
from thalweg.quant.ggml_blocks import PLAIN_DTYPES, dequantize
from thalweg.quant.ggml_types import TYPES, GgmlType
from thalweg.quant.scheme import Range, Shape
from thalweg.weights.checkpoint import refuse
from thalweg.weights.gguf_names import GgufNames, Held, Piece


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """A checkpoint's tensor: `dtype` is the type that all of it has in the file, F32 if it is put together. With `tile`
    its blocks have columns in the file's order."""

    name: str
    dtype: str
    shape: Shape
    tile: Tile | None = None


class GgufCheckpoint:
    """The tensors that `names` describes. Tensors of the file that it does not describe must match one of `ignored`.

    Raises CheckpointError if tensors are missing, unexpected or too small. Nothing is read before `read` asks.
    """

    described_by = "metadata"

    def __init__(self, model: GgufModel, names: GgufNames, ignored: Iterable[str] = ()) -> None:
        self.folder, self._model, self._held = model.path, model, names.held
        self._files = model.tensors
        self._bytes = {file.path: _bytes_of(file) for file in model.files}
        self._check(tuple(ignored))
        self.tensors: Mapping[str, GgufInfo] = {
            name: GgufInfo(name, self._dtype(held), held.shape, held.tile if self._is_torn(held) else None)
            for name, held in names.held.items()
        }

    @property
    def count(self) -> int:
        return len(self._files)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor, or the first piece of it."""
        return self._model.file_of(self._held[name].pieces[0].name).path

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its range [start, stop) along `dim`, as plain numbers. Not to be written to."""
        held, shape = self._held[name], self._held[name].shape
        if dim == 0 and held.change in ("none", "shifted") and not held.by_column:
            stop = shape[0] if stop is None else stop
            each = sum(self._size(piece) for piece in held.pieces) // shape[0]
            rows = [self._numbers(piece) for piece in self._within(held, start * each, stop * each)]
            whole = _joined(rows, 0).reshape(stop - start, *shape[1:])
            return _changed(whole, held)
        if held.change == "latent_up":
            whole = self._latent_up(held)
        else:
            parts = [self._numbers(piece, held.by_column) for piece in held.pieces]
            whole = _joined(parts, int(held.by_column))
        whole = _changed(whole.reshape(shape), held)
        if dim is None:
            return whole
        return whole.narrow(dim, start, (shape[dim] if stop is None else stop) - start)

    def read_blocks(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows [N, bytes of a row] as the file has them, uint8; of a range of columns whole blocks. For tensors
        whose type `tensors` tells."""
        held = self._held[name]
        columns, rows = held.shape[-1], prod(held.shape[:-1])
        kind = TYPES[self.tensors[name].dtype]
        first, last = (start, rows if stop is None else stop) if dim == 0 else (0, rows)
        if self.tensors[name].tile is not None:
            blocks = self._raw(held.pieces[0].name)[first:last]
        elif held.by_column:
            parts = [self._raw(p.name).narrow(1, *_bytes_of_columns(p.part, kind)) for p in held.pieces if p.part]
            blocks = torch.cat(parts, dim=1)[first:last]
        else:
            each = sum(self._size(piece) for piece in held.pieces) // rows
            parts = [self._rows(piece) for piece in self._within(held, first * each, last * each)]
            blocks = _joined(parts, 0).reshape(last - first, kind.row_bytes(columns))
        if dim == len(held.shape) - 1 and dim > 0:
            blocks = blocks.narrow(1, *_bytes_of_columns((start, columns if stop is None else stop), kind))
        return blocks

    def release(self, name: str) -> None:
        """Let go of the memory that pages of the file take once a tensor was copied."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for piece in self._held[name].pieces:
            tensor = self._files[piece.name]
            first, last = piece.part if piece.part and not self._held[name].by_column else (0, tensor.rows)
            start = (tensor.start + first * tensor.row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            length = tensor.start + last * tensor.row_bytes - start
            self._model.file_of(piece.name).mapped.madvise(mmap.MADV_DONTNEED, start, length)

    def _check(self, ignored: tuple[str, ...]) -> None:
        used = {piece.name for held in self._held.values() for piece in held.pieces}
        missing = sorted(used - self._files.keys())
        extra = [n for n in self._files if n not in used and not any(fnmatchcase(n, p) for p in ignored)]
        misshapen = [] if missing else sorted({fault for h in self._held.values() for fault in self._faults(h)})
        refuse(self.folder, "metadata", missing, extra, misshapen)

    def _faults(self, held: Held) -> Iterable[str]:
        """Tensors of the file that cannot hold what is to be held."""
        tensors, elements = [self._files[piece.name] for piece in held.pieces], 0
        for piece, tensor in zip(held.pieces, tensors, strict=True):
            size, other = (tensor.rows, tensor.columns)[:: -1 if held.by_column else 1]
            if piece.part is not None and piece.part[1] > size:
                yield f"{tensor.name} {list(tensor.shape)}, which ends before {piece.part[1]}"
            elements += other * self._size(piece, held.by_column)
        shapes = " and ".join(f"{t.name} {list(t.shape)}" for t in dict.fromkeys(tensors))
        if elements != prod(held.shape) or not all(_fits(tensor, held) for tensor in tensors):
            yield f"{shapes}, not what holds {list(held.shape)}"
        if any(len(t.shape) == 1 and not t.type.is_plain for t in tensors):
            yield f"{shapes} in {tensors[0].type}, not a vector of numbers"
        if held.change == "latent_up" and not _are_latent_up(tensors[0], tensors[-1], held.shape[-1]):
            yield f"{shapes}, not [heads, rank, nope] and [heads, value, rank]"

    def _dtype(self, held: Held) -> str:
        kinds = {self._files[piece.name].type for piece in held.pieces}
        kind = next(iter(kinds))
        return "F32" if len(kinds) > 1 or held.change != "none" else kind.name

    def _is_torn(self, held: Held) -> bool:
        """Whether pieces of columns begin or end within a block."""
        kind = self._files[held.pieces[0].name].type
        return held.by_column and any(i % kind.elements for piece in held.pieces if piece.part for i in piece.part)

    def _size(self, piece: Piece, by_column: bool = False) -> int:
        """Rows, or columns, of a piece."""
        if piece.part is not None:
            return piece.part[1] - piece.part[0]
        tensor = self._files[piece.name]
        return tensor.columns if by_column else tensor.rows

    def _within(self, held: Held, start: int, stop: int) -> Iterable[Piece]:
        """What of the pieces is in rows [start, stop) of the whole."""
        at = 0
        for piece in held.pieces:
            size, first = self._size(piece), piece.part[0] if piece.part else 0
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                yield Piece(piece.name, (first + low - at, first + high - at))
            at += size

    def _raw(self, name: str) -> Tensor:
        """uint8 [rows, bytes of a row]"""
        tensor = self._files[name]
        data = self._bytes[self._model.file_of(name).path][tensor.start : tensor.stop]
        return data.view(tensor.rows, tensor.row_bytes)

    def _rows(self, piece: Piece) -> Tensor:
        rows = self._raw(piece.name)
        return rows if piece.part is None else rows[piece.part[0] : piece.part[1]]

    def _numbers(self, piece: Piece, by_column: bool = False) -> Tensor:
        kind = self._files[piece.name].type
        dtype = PLAIN_DTYPES.get(kind.name, torch.float32)
        if not by_column:
            return dequantize(self._rows(piece), kind, dtype)
        numbers = dequantize(self._raw(piece.name), kind, dtype)
        return numbers if piece.part is None else numbers[:, piece.part[0] : piece.part[1]]

    def _latent_up(self, held: Held) -> Tensor:
        """k_b [H, rank, nope] and v_b [H, value, rank] as [H, nope + value, rank]."""
        k_HRN, v_HVR = (self._numbers(p).float().reshape(self._files[p.name].shape) for p in held.pieces)
        return torch.cat([k_HRN.transpose(1, 2), v_HVR], dim=1)


def _fits(tensor: GgufTensor, held: Held) -> bool:
    """Whether the rows of a tensor are those of what it holds."""
    if held.change == "latent_up":
        return True
    if held.by_column:
        return tensor.rows == held.shape[0]
    return tensor.columns in (1, held.shape[-1])  # 1: a vector, in whatever dimensions


def _are_latent_up(k: GgufTensor, v: GgufTensor, rank: int) -> bool:
    if len(k.shape) != 3 or len(v.shape) != 3:
        return False
    return k.shape[0] == v.shape[0] and k.shape[1] == v.shape[2] == rank


def _bytes_of(file: GgufFile) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as in SafetensorsFile
        return torch.frombuffer(file.mapped, dtype=torch.uint8)


def _bytes_of_columns(part: Range, kind: GgmlType) -> tuple[int, int]:
    """(first, length) of a range of columns that begins and ends with a block."""
    start, stop = (kind.row_bytes(column) for column in part)
    return start, stop - start


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.float() for part in parts]
    return torch.cat(parts, dim)


def _changed(whole: Tensor, held: Held) -> Tensor:
    if held.change == "shifted":
        return whole.float() - 1
    if held.change == "decay":
        if not bool((whole < 0).all()):
            raise CheckpointError(f"{held.pieces[0].name} has values that are not below 0; expected -exp(A_log)")
        return (-whole.float()).log()
    return whole
