"""Who waits, who runs, and the cache they hold.

The order of arrival rules: every running sequence arrived before every waiting one. Admission takes the head
of the queue or nobody; preemption takes the running sequence that arrived last and makes it the head. So the
oldest sequence never gives way, and nothing starves.
"""

from __future__ import annotations

from collections import OrderedDict

from thalweg.cache.manager import CacheManager
from thalweg.scheduler.sequence import Sequence


class Roster:
    """Every unfinished sequence, in one of three places. At most one is partly prefilled."""

    def __init__(self, cache: CacheManager, max_num_seqs: int) -> None:
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.sequences: dict[str, Sequence] = {}  # all of them, by request id
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()  # in order of arrival
        self.decoding: list[Sequence] = []  # prefill planned to its end; in order of arrival
        self.prefilling: Sequence | None = None  # arrived after all of `decoding`
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self.decoding) + (self.prefilling is not None)

    def enqueue(self, seq: Sequence) -> None:
        """A new sequence, at the end of the queue."""
        self.sequences[seq.request_id] = self.waiting[seq.request_id] = seq

    def admit(self, steps_done: int) -> tuple[Sequence, list[int]] | None:
        """Moves the head of the queue to `prefilling`; gives it a slot and the blocks for all its tokens.

        None when the head must wait. A block is left for every running sequence that may still need one:
        otherwise the one admitted would soon be preempted, its prefill wasted.
        """
        if not self.waiting or self.num_running >= self.max_num_seqs:
            return None
        seq = next(iter(self.waiting.values()))
        num_tokens = seq.num_prompt + len(seq.output)
        reserve = sum(other.capacity < other.max_computed for other in self.decoding)
        if seq.ready_after > steps_done or not self.cache.can_admit(num_tokens, reserve):
            return None
        del self.waiting[seq.request_id]
        seq.slot, blocks = self.cache.admit(seq.request_id, num_tokens)
        seq.target = num_tokens
        seq.capacity = self.cache.tokens_in(len(blocks))
        self.prefilling = seq
        return seq, blocks

    def prefilled(self) -> None:
        """The last prefill of `prefilling` is planned; from now on it decodes."""
        assert self.prefilling is not None
        self.decoding.append(self.prefilling)
        self.prefilling = None

    def grow(self, seq: Sequence, num_steps: int) -> list[int]:
        """Blocks so that decoding `seq` can cache one more token, at the cost of whoever arrived last.

        [] when `seq` has given way, now or before its turn. num_steps is the number of steps planned so far.
        """
        while seq.slot:
            blocks = self.cache.grow(seq.request_id, seq.computed + 1)
            if blocks is not None:
                seq.capacity += self.cache.tokens_in(len(blocks))
                return blocks
            self._preempt(self.prefilling or self.decoding[-1], num_steps)
        return []

    def _preempt(self, seq: Sequence, num_steps: int) -> None:
        # Not before the steps in flight are done does the host know all tokens of the sequence.
        self._leave_running(seq)
        self.waiting[seq.request_id] = seq
        self.waiting.move_to_end(seq.request_id, last=False)
        seq.reset(ready_after=num_steps)
        self.num_preemptions += 1

    def end(self, seq: Sequence) -> None:
        """Leaves no trace of a sequence but its rows in flight, which are dropped when they arrive."""
        if seq.slot:
            self._leave_running(seq)
        else:
            del self.waiting[seq.request_id]
        seq.finished = True
        del self.sequences[seq.request_id]

    def _leave_running(self, seq: Sequence) -> None:
        if seq is self.prefilling:
            self.prefilling = None
        else:
            self.decoding.remove(seq)
        self.cache.release(seq.request_id)
