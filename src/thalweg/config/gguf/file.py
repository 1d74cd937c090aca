"""One GGUF file: a header read with suspicion, then tensors as places in the mapped file. No torch.

Format: magic, version, counts; keys and values; for each tensor its name, dimensions (fastest first), type and
offset; padding; the data. Everything the header says is checked against the file's real size before it is believed.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.config.gguf.values import Cursor
from thalweg.config.unfetched import HEAD_BYTES, why_unfetched
from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.quant.ggml_types import BY_ID, TYPES, UNREAD, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 10_000
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 256
MAX_DIMS = 4
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file, its shape slowest dimension first, and its bytes [start, stop) in the file."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def columns(self) -> int:
        """Elements of a row, the fastest dimension; of a vector of numbers, whose rows are its elements, 1."""
        is_vector = math.prod(self.shape) == max(self.shape)
        return 1 if is_vector and self.type.is_plain else self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.columns

    @property
    def row_bytes(self) -> int:
        return (self.stop - self.start) // self.rows


class GgufFile:
    """One open file: `metadata` by key, `tensors` in file order, and its bytes as `mapped`.

    Raises CheckpointError, one line that begins with the path, if the file is missing, damaged or hostile, and
    UnsupportedError for a version or a type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(HEAD_BYTES)
                if reason := why_unfetched(head):
                    raise CheckpointError(f"{path} {reason}")
                if size < 24 or head[:4] != MAGIC:
                    raise CheckpointError(f"{path} begins with {head[:4]!r}, {size} bytes in all; expected a GGUF file")
                self.mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        cursor = Cursor(self.mapped, str(path), len(MAGIC))
        _check_version(cursor.u32("the version"), path)
        num_tensors, num_keys = cursor.u64("the number of tensors"), cursor.u64("the number of keys")
        for count, limit, what in ((num_tensors, MAX_TENSORS, "tensors"), (num_keys, MAX_KEYS, "keys")):
            if count > limit:
                raise cursor.error(f"it has {count} {what}; expected at most {limit}")
        self.metadata = _read_metadata(cursor, num_keys)
        records = [_read_record(cursor) for _ in range(num_tensors)]
        alignment = _alignment(self.metadata, cursor)
        data = -(-cursor.position // alignment) * alignment
        self.tensors = _placed(records, data, alignment, size, path)


Record = tuple[str, GgmlType, tuple[int, ...], int]


def _check_version(version: int, path: Path) -> None:
    if version in VERSIONS:
        return
    if version.to_bytes(4, "little") in [v.to_bytes(4, "big") for v in VERSIONS]:
        raise UnsupportedError(f"{path} is big-endian; expected a little-endian GGUF file")
    raise UnsupportedError(f"{path} is of GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}")


def _read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a key", MAX_NAME_BYTES)
        if not key.isprintable() or not key or key in metadata:
            raise cursor.error(f"a key is {ascii(key)[:120]}; expected printable characters, and every key once")
        metadata[key] = cursor.value(key)
    return metadata


def _alignment(metadata: dict[str, Any], cursor: Cursor) -> int:
    alignment = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    valid = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not valid or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        shown = ascii(alignment)[:40]
        raise cursor.error(f"{ALIGNMENT} is {shown}; expected a power of two from 1 to {MAX_ALIGNMENT}")
    return int(alignment)


def _read_record(cursor: Cursor) -> Record:
    """One tensor's entry, checked on its own."""
    name = cursor.string("a tensor's name", MAX_NAME_BYTES)
    label = ascii(name)[:120]
    if not name or not name.isprintable():
        raise cursor.error(f"a tensor is named {label}; expected printable characters")
    count = cursor.u32(f"the number of dimensions of {label}")
    if not 0 < count <= MAX_DIMS:
        raise cursor.error(f"{label} has {count} dimensions; expected 1 to {MAX_DIMS}")
    shape = tuple(cursor.u64(f"a dimension of {label}") for _ in range(count))[::-1]
    if any(not 0 < size < 2**48 for size in shape) or math.prod(shape) >= 2**48:
        raise cursor.error(f"{label} has shape {list(shape)}; expected sizes above 0, and below 2^48 elements")
    number = cursor.u32(f"the type of {label}")
    if number not in BY_ID:
        unread, known = UNREAD.get(number, f"number {number}"), ", ".join(TYPES)
        raise UnsupportedError(str(cursor.error(f"{label} is of type {unread}; expected one of {known}")))
    kind = BY_ID[number]
    if shape[-1] % kind.elements:
        raise cursor.error(f"{label} has rows of {shape[-1]}; expected a multiple of {kind.elements} for {kind}")
    return name, kind, shape, cursor.u64(f"the offset of {label}")


def _placed(records: list[Record], data: int, alignment: int, size: int, path: Path) -> dict[str, GgufTensor]:
    """The tensors, each within the file and none over another."""
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in sorted(records, key=lambda record: record[3]):
        start = data + offset
        stop = start + kind.row_bytes(math.prod(shape))
        label = ascii(name)[:120]
        if offset % alignment:
            raise CheckpointError(f"{path}: {label} is at offset {offset}; expected a multiple of {alignment}")
        if stop > size:
            raise CheckpointError(
                f"{path}: {label} ends at byte {stop} of {size};"
                " expected it inside: the file is cut short or its header is wrong"
            )
        if name in tensors:
            raise CheckpointError(f"{path}: {label} occurs twice; expected every tensor once")
        if tensors and start < (previous := next(reversed(tensors.values()))).stop:
            raise CheckpointError(f"{path}: {label} overlaps {ascii(previous.name)[:120]}; expected them apart")
        tensors[name] = GgufTensor(name, kind, shape, start, stop)
    return tensors
