"""Answers that are kept for requests that continue from them: so many, so many bytes, for so long."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from thalweg.server.settings import StoreLimits


@dataclass(frozen=True, slots=True)
class Stored:
    """`response` is JSON, as it was sent. `messages` is JSON of the conversation with the answer at its end, without
    instructions. `owner`: the caller who may have them."""

    owner: bytes
    response: bytes
    messages: bytes
    expires: float = 0.0

    @property
    def size(self) -> int:
        return len(self.response) + len(self.messages)


class ResponseStore:
    """In memory alone. What was kept first gives way first; whoever is not the owner finds nothing."""

    def __init__(self, limits: StoreLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._limits.count > 0

    def put(self, response_id: str, owner: bytes, response: bytes, messages: bytes) -> bool:
        """Keep an answer. False, and it is not kept, if it alone is larger than all that may be kept."""
        stored = Stored(owner, response, messages, self._clock() + self._limits.seconds)
        if stored.size > self._limits.bytes:
            return False
        self._kept[response_id] = stored
        self.bytes += stored.size
        self._trim()
        return True

    def get(self, response_id: str, owner: bytes) -> Stored | None:
        self._trim()
        stored = self._kept.get(response_id)
        return stored if stored is not None and stored.owner == owner else None

    def delete(self, response_id: str, owner: bytes) -> bool:
        """Whether there was one to delete."""
        if self.get(response_id, owner) is None:
            return False
        self._drop(response_id)
        return True

    def _trim(self) -> None:
        now, limits = self._clock(), self._limits
        while self._kept:
            first, stored = next(iter(self._kept.items()))
            if len(self._kept) <= limits.count and self.bytes <= limits.bytes and now < stored.expires:
                return
            self._drop(first)

    def _drop(self, response_id: str) -> None:
        self.bytes -= self._kept.pop(response_id).size
