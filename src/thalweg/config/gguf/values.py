"""The values of a GGUF header, read with suspicion: a cursor that never leaves its bytes and counts what it makes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from mmap import mmap
from typing import Any

from thalweg.errors import CheckpointError

MAX_HEADER_BYTES = 512 << 20
MAX_STRING_BYTES = 16 << 20
MAX_VALUES = 8_000_000  # strings and numbers of a header, elements of arrays included
MAX_NESTING = 2  # arrays of arrays

_U64 = struct.Struct("<Q")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class Cursor:
    """Reads a header from `position` on. Whatever leads outside the file, or is more than a header may hold, raises
    CheckpointError, which begins with `where`, before it is allocated."""

    def __init__(self, data: mmap | bytes, where: str, position: int = 0) -> None:
        self._data, self._where = data, where
        self._end = min(len(data), MAX_HEADER_BYTES)
        self.position = position
        self._values = 0

    def u32(self, what: str) -> int:
        return int(self._scalar("I", what))

    def u64(self, what: str) -> int:
        return int(self._scalar("Q", what))

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """UTF-8 of a u64 length and so many bytes. Bytes that are not become U+FFFD."""
        length = self.u64(f"the length of {what}")
        self._need(length, what, limit)
        start, self.position = self.position, self.position + length
        return self._data[start : self.position].decode("utf-8", errors="replace")

    def value(self, what: str) -> Any:
        """A value after its type: a number, a bool, a string, or a list of one kind of them."""
        return self._of_kind(self.u32(f"the type of {what}"), what, 0)

    def error(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {fault}")

    def _of_kind(self, kind: int, what: str, depth: int) -> Any:
        self._count(1, what)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what, depth + 1)
        raise self.error(f"{what} is of type {kind}; expected one of 0 to 12")

    def _array(self, what: str, depth: int) -> list[Any]:
        if depth > MAX_NESTING:
            raise self.error(f"{what} has arrays {depth} deep; expected {MAX_NESTING} at most")
        kind, count = self.u32(f"the type of {what}"), self.u64(f"the count of {what}")
        self._count(count, what)
        if kind in _SCALARS:
            layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
            self._need(layout.size, what)
            start, self.position = self.position, self.position + layout.size
            return list(layout.unpack_from(self._data, start))
        if kind == _STRING:
            return self._strings(count, what)
        if kind != _ARRAY:
            raise self.error(f"{what} has elements of type {kind}; expected one of 0 to 12")
        return [self._array(what, depth + 1) for _ in range(count)]

    def _strings(self, count: int, what: str) -> list[str]:
        """As `string`, without a call for each: vocabularies have hundreds of thousands."""
        data, at, end = self._data, self.position, self._end
        length_at: Callable[[mmap | bytes, int], tuple[int]] = _U64.unpack_from
        strings = []
        for _ in range(count):
            start = at + 8
            if start > end:
                raise self.error(f"the file ends within {what}; expected it to go on: it is cut short or damaged")
            at = start + length_at(data, at)[0]
            if at > end or at - start > MAX_STRING_BYTES:
                raise self.error(f"{what} has a string of {at - start} bytes; expected fewer, within the header")
            strings.append(data[start:at].decode("utf-8", errors="replace"))
        self.position = at
        return strings

    def _scalar(self, code: str, what: str) -> Any:
        layout = struct.Struct(f"<{code}")
        self._need(layout.size, what)
        (value,) = layout.unpack_from(self._data, self.position)
        self.position += layout.size
        return value

    def _need(self, length: int, what: str, limit: int = MAX_HEADER_BYTES) -> None:
        left = self._end - self.position
        if length > min(left, limit):
            raise self.error(
                f"{what} takes {length} bytes; expected at most {min(left, limit)}: the file is cut short or damaged"
            )

    def _count(self, values: int, what: str) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise self.error(f"{what} has {values} values; expected at most {MAX_VALUES} in all of the header")
