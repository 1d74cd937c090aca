"""Safetensors files: a header read with suspicion, then tensors as lazy views of the mapped file.

Format: 8 bytes of header length (little endian), a JSON object {name: {dtype, shape, data_offsets}}, then the
data. Everything the header says is checked against the file's real size before any of it is believed.
"""

from __future__ import annotations

import mmap
import os
import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from thalweg.config.bounded_json import parse_object
from thalweg.config.unfetched import HEAD_BYTES, why_unfetched
from thalweg.errors import CheckpointError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8
MAX_NAME_CHARS = 1024

# Bits of every dtype the format knows; those with a torch dtype here can be loaded.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
PLAIN_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32}  # the latter holds packed elements
LOADABLE = PLAIN_DTYPES | QUANTIZED


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype as the format spells it, shape, and its bytes [start, stop) in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class SafetensorsFile:
    """One open file. `tensors` is in file order; `read` gives views of the mapping, so only what is used is
    read.

    Raises CheckpointError, one line that begins with the path, when the file is missing, damaged or hostile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.tensors = _read_header(file, size, path)
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        with warnings.catch_warnings():
            # torch warns of buffers it could write to by mistake; a writable mapping would count as memory in
            # use.
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its range [start, stop) along `dim`, in the file's dtype. Not a copy: do not write
        to it.

        Raises UnsupportedError for a dtype that nothing here is stored in.
        """
        info = self.tensors[name]
        if info.dtype not in LOADABLE:
            raise UnsupportedError(unsupported_dtype(info.name, info.dtype, self.path))
        data = self._bytes[info.start : info.stop]
        dtype = LOADABLE[info.dtype]
        if info.start % dtype.itemsize:
            data = data.clone()  # an unpadded header leaves tensors unaligned
        tensor = data.view(dtype).view(info.shape)
        if dim is None:
            return tensor
        stop = info.shape[dim] if stop is None else stop
        return tensor.narrow(dim, start, stop - start)

    def raw(self, name: str) -> Tensor:
        """The tensor's bytes, uint8 [n]. Not a copy."""
        info = self.tensors[name]
        return self._bytes[info.start : info.stop]


def unsupported_dtype(name: str, dtype: str, path: Path, expected: str | None = None) -> str:
    """The line that says why a tensor's dtype cannot be loaded where `expected` is (None: a plain number)."""
    plain = f"one of {', '.join(PLAIN_DTYPES)}; {', '.join(QUANTIZED)} only for what config.json says is quantized"
    return f"{path.name}: {name} is {dtype}; expected {expected or plain}, with its scales"


def _read_header(file: BinaryIO, size: int, path: Path) -> dict[str, TensorInfo]:
    """The checked header. `size` is the file's real size in bytes."""
    head = file.read(HEAD_BYTES)
    if reason := why_unfetched(head):
        raise CheckpointError(f"{path} {reason}")
    file.seek(8)
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes; expected a safetensors file, which begins with 8")
    length = int.from_bytes(head[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        limit = min(MAX_HEADER_BYTES, size - 8)
        shown = head[:40].decode("latin-1")  # what servers answer in place of a file is text
        text = f", which begins with {shown!r}" if shown.isascii() and shown.isprintable() else ""
        raise CheckpointError(
            f"{path}: header length is {length}; expected at most {limit} (file of {size} bytes{text})"
        )
    header = file.read(length)
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: the header begins with {header[:8]!r}; expected a JSON object")
    entries = parse_object(header, f"{path}: header", max_depth=4)
    _check_metadata(entries.pop("__metadata__", {}), path)
    data_start = 8 + length
    infos = [_tensor_info(name, entry, data_start, size, path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_layout(infos, data_start, size, path)
    return {info.name: info for info in infos}


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings; expected one, or none")


def _tensor_info(name: str, entry: Any, data_start: int, size: int, path: Path) -> TensorInfo:
    """One header entry, checked on its own."""
    label = ascii(name[:120])
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise CheckpointError(f"{path}: a tensor is named {label}; expected 1 to {MAX_NAME_CHARS} printable characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {label} has a malformed entry; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: {label} has dtype {ascii(dtype)[:40]}; expected one of {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{path}: {label} has shape {ascii(shape)[:80]}; expected up to {MAX_DIMS} sizes >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {label} has data_offsets {ascii(offsets)[:80]}; expected [start, stop]")
    start, stop = offsets
    if data_start + stop > size:
        raise CheckpointError(
            f"{path}: {label} ends at byte {data_start + stop} of {size}; "
            "expected it inside: the file is cut short or its header is wrong"
        )
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (stop - start):
        raise CheckpointError(f"{path}: {label} has {stop - start} bytes; expected {bits / 8:g} for {dtype} {shape}")
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _check_layout(infos: list[TensorInfo], data_start: int, size: int, path: Path) -> None:
    """Tensors, in file order, must cover the data exactly: no overlap, no gap, nothing after the last."""
    position, previous = data_start, "the header"
    for info in infos:
        if info.start != position:
            fault = "overlaps" if info.start < position else "leaves a gap after"
            names = f"{info.name[:120]!a} {fault} {previous[:120]!a}"
            raise CheckpointError(f"{path}: {names}; expected it to start at byte {position}")
        position, previous = info.stop, info.name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes follow the last tensor; expected none")
