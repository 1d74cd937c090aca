"""Numbered places of the cache, and which of them are free: blocks here, state slots in slots.py."""

from __future__ import annotations

from collections.abc import Iterable


class CacheAccountingError(RuntimeError):
    """The accounting was used wrongly: a bug in Thalweg, never a user's mistake."""


class Pool:
    """Places numbered 1 to `size`. Place 0 is the sink that padding touches; it is never handed out."""

    kind = "place"

    def __init__(self, size: int) -> None:
        if size < 0:
            raise CacheAccountingError(f"a pool of {size} {self.kind}s; expected 0 or more")
        self._size = size
        self._free = list(range(size, 0, -1))  # a stack: what was used last is warm, so it goes out first
        self._taken = bytearray(size + 1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def taken(self) -> list[int]:
        """The numbers now handed out, in order; walks the whole pool."""
        return [number for number, taken in enumerate(self._taken) if taken]

    def _take(self, n: int) -> list[int]:
        if not 0 <= n <= len(self._free):
            raise CacheAccountingError(f"{n} {self.kind}s were asked for; {len(self._free)} are free")
        if n == 0:
            return []
        numbers = self._free[: -n - 1 : -1]
        del self._free[-n:]
        for number in numbers:
            self._taken[number] = 1
        return numbers

    def _give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if not 1 <= number <= self._size:
                raise CacheAccountingError(f"{self.kind} {number} was freed; the pool has 1 to {self._size}")
            if not self._taken[number]:
                raise CacheAccountingError(f"{self.kind} {number} was freed twice")
            self._taken[number] = 0
            self._free.append(number)


class BlockPool(Pool):
    """Blocks of the paged cache, numbered 1 to num_blocks."""

    kind = "block"

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.num_blocks = num_blocks

    def allocate(self, n: int) -> list[int]:
        """n free blocks, which become the caller's. Raises CacheAccountingError when there are fewer."""
        return self._take(n)

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back. Raises CacheAccountingError at one that is not taken, or not of this pool."""
        self._give_back(blocks)
