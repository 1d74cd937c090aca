"""Two accuracies on the same questions: is the difference more than chance gives?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, fsum, lgamma, log, sqrt
from typing import Any

Asked = tuple[str, int]  # a question, and which of those with the same text


@dataclass(frozen=True, slots=True)
class Difference:
    """B's accuracy less A's, and its standard error.

    `only_a` and `only_b` are the questions that A alone and B alone answered right, and `p_value` is McNemar's exact
    test on them: how likely chance alone makes the two this unequal or more. None where the questions are not known.
    """

    delta: float
    error: float
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None

    @property
    def is_beyond_error(self) -> bool:
        return abs(self.delta) > self.error


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of `count` questions answered right, and which ones if the file says."""

    share: float
    count: int
    right: Mapping[Asked, bool] | None = None

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Accuracy | None:
        """From a row of `thalweg eval --output-json`; None if it is none."""
        share, count = row.get("accuracy"), row.get("num_questions")
        if not (isinstance(share, int | float) and 0 <= share <= 1 and type(count) is int and count > 0):
            return None
        return cls(share, count, _right(row.get("answers"), count))

    def to(self, other: Accuracy) -> Difference:
        """What changes from this one to `other`: paired if both know the same questions."""
        delta = other.share - self.share
        if self.right is None or other.right is None or self.right.keys() != other.right.keys():
            variance = sum(x.share * (1 - x.share) / x.count for x in (self, other))
            return Difference(delta, sqrt(variance))
        only_a = sum(right and not other.right[question] for question, right in self.right.items())
        only_b = sum(right and not self.right[question] for question, right in other.right.items())
        variance = (only_a + only_b - (only_b - only_a) ** 2 / self.count) / self.count**2
        return Difference(delta, sqrt(variance), only_a, only_b, _mcnemar(only_a, only_b))

    def show(self, digits: int) -> str:
        return f"{self.share:.{digits}f} (+-{sqrt(self.share * (1 - self.share) / self.count):.{digits}f})"


def _mcnemar(a: int, b: int) -> float:
    """Twice the chance that of a + b tosses of a coin at most min(a, b) are heads; 1 at most."""
    n = a + b
    log_chances = (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2) for k in range(min(a, b) + 1))
    return min(1.0, 2 * fsum(exp(x) for x in log_chances))


def _right(answers: Any, count: int) -> dict[Asked, bool] | None:
    if not isinstance(answers, list) or len(answers) != count:
        return None
    seen: Counter[str] = Counter()
    right = {}
    for answer in answers:
        question, correct = (
            (answer.get("question"), answer.get("correct")) if isinstance(answer, dict) else (None, None)
        )
        if not (isinstance(question, str) and isinstance(correct, bool)):
            return None
        right[question, seen[question]] = correct
        seen[question] += 1
    return right
