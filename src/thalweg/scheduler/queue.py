"""Who of the queue begins next, given what is cached of their prompts."""

from __future__ import annotations

from thalweg.cache.manager import CacheManager
from thalweg.cache.node import Match
from thalweg.scheduler.prefixes import Prefixes
from thalweg.scheduler.roster import Roster
from thalweg.scheduler.sequence import Sequence

MOST_OVERTAKEN = 64  # requests that one plan passes over, each of which costs a look


class Queue:
    """The head of the queue begins, or, while it waits for what the plan being made computes of its prompt or for what
    comes from host memory, the first one behind it that does not, and has room as a whole."""

    def __init__(self, cache: CacheManager, roster: Roster, prefixes: Prefixes) -> None:
        self._cache, self._roster, self._prefixes = cache, roster, prefixes
        self.landed = -1  # what plans up to this one fetched from host memory is there

    def begin(
        self, step: int, steps_done: int, budget: int, whole: bool, idle: bool
    ) -> tuple[Sequence, list[int]] | None:
        """Admit one in plan `step`, with its block table; None if nobody can be.

        `whole`: only if the budget has room for all of it, or at least for what the prefix cache wants in one piece.
        `idle`: nothing runs while copies come, so that nobody is to wait for them before its step does.
        """
        waiting: list[Sequence] = []
        match: Match | None = None
        for seq in self._roster.candidates(steps_done):
            if seq.waits_in != step:
                match = self._prefixes.find(seq)
                if match is None:
                    break
                if match.far is not None and not match.soon and seq.fetched_in < 0:
                    match = self._fetch(seq, match, step, waiting)
                if not match.soon and (seq.fetched_in <= self.landed or idle):
                    break
                known = match.seen if match.soon else match.node.depth
                seq.waits_in, seq.lacks = step, self._cache.blocks_for(seq.num_known) - known
            waiting.append(seq)
            if len(waiting) == MOST_OVERTAKEN:
                return None
        else:
            return None
        least = seq.num_known - (0 if match is None else match.node.depth * self._cache.block_size)
        if whole and not waiting:
            least = min(least, self._prefixes.least)
        if budget < least and (whole or waiting):
            return None
        blocks = self._roster.admit(seq, None if match is None else match.node, waiting)
        if blocks is None:
            return None
        if match is not None:
            self._prefixes.admitted(seq, match)
        return seq, blocks

    def _fetch(self, seq: Sequence, match: Match, step: int, waiting: list[Sequence]) -> Match:
        """Have the plan bring back what host memory has of a prompt that could begin now. What is known of it then."""
        if not self._roster.has_room(seq, match.node, waiting):
            return match
        if self._prefixes.fetch(match):
            seq.fetched_in = step
        found = self._prefixes.find(seq)
        assert found is not None
        return found
