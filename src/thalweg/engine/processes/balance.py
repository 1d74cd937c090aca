"""Which data-parallel rank serves a request, and what all of them say together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec

from thalweg.core import Request, SchedulerStats

CHUNK = 256  # tokens: beginnings of prompts are remembered at multiples
MOST_BEGINNINGS = 100_000
EXPECTED = 1024  # tokens of an answer at most that are counted ahead: most end sooner than they may


class Balance:
    """Requests by rank. A new one goes to the rank with the fewest tokens in flight: those of prompts, and those that
    are expected to come, less those of the longest beginning of its prompt that the rank had lately, which its prefix
    cache may hold. Among equals, ranks take turns."""

    def __init__(self, ranks: int) -> None:
        self.tokens, self.requests = [0] * ranks, [0] * ranks  # in flight
        self._rank_of: dict[str, int] = {}
        self._left: dict[str, int] = {}  # tokens of each request that has not ended
        self._turn = 0
        self._had: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ranks)]  # beginnings, the latest last

    def add(self, request: Request) -> int:
        """The rank that is to serve the request."""
        ranks = len(self.tokens)
        beginnings = _beginnings(request) if ranks > 1 else []
        left = [tokens - self._held(rank, beginnings) for rank, tokens in enumerate(self.tokens)]
        rank = min(range(ranks), key=lambda r: (left[r], (r - self._turn) % ranks))
        self._turn = (rank + 1) % ranks
        for beginning in beginnings:
            self._had[rank][beginning] = None
            self._had[rank].move_to_end(beginning)
        while len(self._had[rank]) > MOST_BEGINNINGS:
            self._had[rank].popitem(last=False)
        most = request.params.max_tokens
        tokens = len(request.prompt_token_ids) + (EXPECTED if most is None else min(most, EXPECTED))
        self._rank_of[request.id], self._left[request.id] = rank, tokens
        self.tokens[rank] += tokens
        self.requests[rank] += 1
        return rank

    def _held(self, rank: int, beginnings: list[int]) -> int:
        """Tokens of the longest of the beginnings that the rank had."""
        had = self._had[rank]
        return CHUNK * next((n for n in range(len(beginnings), 0, -1) if beginnings[n - 1] in had), 0)

    def rank_of(self, request_id: str) -> int | None:
        """Which rank serves a request; None if it was never added, or forgotten."""
        return self._rank_of.get(request_id)

    def is_under_way(self, request_id: str) -> bool:
        """Whether a request was added and has not ended."""
        return request_id in self._left

    def came(self, request_id: str, tokens: int) -> None:
        """So many of its tokens came."""
        if request_id in self._left:
            tokens = min(tokens, self._left[request_id])
            self._left[request_id] -= tokens
            self.tokens[self._rank_of[request_id]] -= tokens

    def end(self, request_id: str) -> None:
        """Its rank has no more to do for it."""
        left = self._left.pop(request_id, None)
        if left is not None:
            rank = self._rank_of[request_id]
            self.tokens[rank] -= left
            self.requests[rank] -= 1

    def forget(self, request_id: str) -> None:
        """Nobody will ask for its rank any more."""
        self.end(request_id)
        self._rank_of.pop(request_id, None)


def _beginnings(request: Request) -> list[int]:
    """A number for each multiple of CHUNK tokens that the prompt begins with, which differs where salts do."""
    ids, numbers, number = request.prompt_token_ids, [], hash(request.params.cache_salt)
    for start in range(0, len(ids) - CHUNK + 1, CHUNK):
        number = hash((number, *ids[start : start + CHUNK]))
        numbers.append(number)
    return numbers


def ended(stats: SchedulerStats) -> SchedulerStats:
    """What a rank said, once it is gone with all that it held."""
    return msgspec.structs.replace(stats, num_running=0, num_waiting=0, blocks_used=0, slots_used=0)


def together(stats: Iterable[SchedulerStats]) -> SchedulerStats:
    """The sums over ranks."""
    sums: dict[str, Any] = {}
    for each in map(msgspec.structs.asdict, stats):
        for name, value in each.items():
            if isinstance(value, dict):
                total = sums.setdefault(name, {})
                sums[name] = {key: total.get(key, 0) + value.get(key, 0) for key in {**total, **value}}
            else:
                sums[name] = sums.get(name, 0) + value
    return SchedulerStats(**sums)
