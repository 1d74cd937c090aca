"""Writes GGUF files: a header from plain values, then each tensor's bytes as they come. No torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from thalweg.config.gguf.file import DEFAULT_ALIGNMENT, MAGIC, VERSIONS
from thalweg.quant.ggml_types import GgmlType

_BOOL, _STRING, _ARRAY, _U32, _I32, _F32, _U64 = 7, 8, 9, 4, 5, 6, 10


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write, its shape slowest dimension first; `content` gives its bytes when their turn comes."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    content: Callable[[], bytes | memoryview]

    @property
    def nbytes(self) -> int:
        return self.type.row_bytes(prod(self.shape))


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Numbers are written as llama.cpp's own converter writes them: integers as u32, in arrays as i32, floats as f32.

    Raises ValueError if a tensor's content is not as long as its type and shape say.
    """
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", max(VERSIONS), len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            dims = tensor.shape[::-1]
            layout = f"<I{len(dims)}QIQ"
            file.write(_string(tensor.name) + struct.pack(layout, len(dims), *dims, tensor.type.id, offset))
            offset += _padded(tensor.nbytes)
        _pad(file)
        for tensor in tensors:
            content = tensor.content()
            if len(content) != tensor.nbytes:
                raise ValueError(f"{tensor.name} has {len(content)} bytes; expected {tensor.nbytes}")
            file.write(content)
            _pad(file)


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_padded(file.tell()) - file.tell()))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value after its type."""
    if isinstance(value, list | tuple):
        kind = _kind(value[0], in_array=True) if value else _I32
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_packed(item, kind) for item in value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _packed(value, kind)


def _kind(value: Any, *, in_array: bool = False) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        small = _I32 if in_array or value < 0 else _U32
        return small if value < 2**32 else _U64
    return _F32 if isinstance(value, float) else _STRING


def _packed(value: Any, kind: int) -> bytes:
    if kind == _STRING:
        return _string(value)
    return struct.pack({_BOOL: "<?", _U32: "<I", _I32: "<i", _F32: "<f", _U64: "<Q"}[kind], value)
