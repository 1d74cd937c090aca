"""How much a request has reasoned, and when it has to stop: tokens between two marks that are tokens themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from thalweg.core import ThinkingLimit

Read = Callable[[], list[int]]  # the ids of a step, once they are known on the host


class ThinkingCount:
    """Counts the tokens of reasoning in an output, the marks left out. `inside`: it is reasoning now."""

    def __init__(self, begin: int, end: int, inside: bool) -> None:
        self._begin, self._end = begin, end
        self.inside, self.tokens = inside, 0

    def take(self, token: int) -> None:
        if token == self._end:
            self.inside = False
        elif token == self._begin:
            self.inside = True
        elif self.inside:
            self.tokens += 1


class ThinkingState:
    """How far one request is in its budget. On ranks whose tokens do not count nothing is ever demanded.

    A token is waited for only if it decides what the next one may be. Until then it is taken in a step late, when it
    is there already.
    """

    def __init__(self, limit: ThinkingLimit, output: Sequence[int], counts: bool) -> None:
        """`output`: what the request has generated so far."""
        self.begin, self.end = limit.begin, limit.end
        self._most, self._counts = limit.max_tokens, counts
        self._count = ThinkingCount(limit.begin, limit.end, limit.begun)
        for token in output:
            self._count.take(token)
        self._noted: deque[tuple[Read, int]] = deque()

    def sampled(self, read: Read, i: int) -> None:
        """Take note of where the token just chosen will be: read()[i]."""
        if self._counts:
            self._noted.append((read, i))

    def closes(self) -> bool:
        """Whether the next token has to be the closing mark."""
        count = self._count
        while self._noted and (len(self._noted) > 1 or (count.inside and count.tokens + 1 >= self._most)):
            read, i = self._noted.popleft()
            count.take(read()[i])
        return self._counts and count.inside and self.spent

    @property
    def spent(self) -> bool:
        """Whether no reasoning may begin any more."""
        return self._counts and self._count.tokens >= self._most
