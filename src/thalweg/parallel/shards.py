"""How dimensions are shared out over ranks, in integers: layers and weight plans ask the same object."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.errors import ConfigError

Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True, slots=True)
class Shards:
    """This rank's share of dimensions under tensor parallelism, and its number among data-parallel ranks."""

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"tensor-parallel rank is {self.rank}; expected 0 to {self.size - 1}")

    def count(self, total: int, what: str) -> int:
        """total / size. Raises ConfigError when that is not whole; `what` names the dimension."""
        if total % self.size:
            raise ConfigError(f"--tensor-parallel-size is {self.size}; it must divide {what}, which is {total}")
        return total // self.size

    def even(self, total: int, what: str, unit: int = 1) -> Range:
        """This rank's range of total * unit rows, cut between units (heads). Raises as count() does."""
        n = self.count(total, what) * unit
        return self.rank * n, (self.rank + 1) * n

    def shared_count(self, total: int, what: str) -> int:
        """Heads on each rank where several ranks may hold the same one: total / size, or 1 if there are fewer heads
        than ranks. Raises ConfigError unless one divides the other."""
        if self.size % total == 0:
            return 1
        return self.count(total, what)

    def shared(self, total: int, what: str, unit: int = 1) -> Range:
        """This rank's range of total * unit rows of key heads, which ranks beyond their number replicate: neighbouring
        ranks, whose query heads share a key head, hold the same one. Raises as shared_count() does."""
        n = self.shared_count(total, what)
        first = self.rank * total // self.size
        return first * unit, (first + n) * unit

    def padded(self, total: int) -> tuple[int, Range]:
        """Rows allocated on every rank, ceil(total / size), and the range of real rows here (may be empty)."""
        rows = -(-total // self.size)
        return rows, (min(self.rank * rows, total), min((self.rank + 1) * rows, total))
