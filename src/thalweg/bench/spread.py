"""A measured quantity with its spread; a single number hides how far it can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of a quantity's samples, in its own unit."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Raises ValueError without samples."""
        values = list(samples)
        return cls(median(values), min(values), max(values))

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.min:.{digits}f}..{self.max:.{digits}f})"
