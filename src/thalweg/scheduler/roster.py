"""Who waits, who runs, and the cache they hold.

The order of arrival rules: every running sequence comes before every waiting one. Admission takes the head of the
queue. While the head waits for what the plan being made computes, another may overtake it, if what the head needs is
left; in the next plan it is the head's turn. Preemption takes the running sequence that is last in order and makes it
the head. So the first sequence never gives way, and nothing starves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from thalweg.cache.manager import CacheManager
from thalweg.cache.node import Node
from thalweg.scheduler.prefixes import Prefixes
from thalweg.scheduler.sequence import Sequence


class Roster:
    """Every unfinished sequence, in one of three places. At most one is partly prefilled."""

    def __init__(self, cache: CacheManager, max_num_seqs: int, prefixes: Prefixes) -> None:
        self.cache = cache
        self.prefixes = prefixes
        self.max_num_seqs = max_num_seqs
        self.sequences: dict[str, Sequence] = {}  # all of them, by request id
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()  # in order
        self.decoding: list[Sequence] = []  # prefill planned to its end; in order
        self.prefilling: Sequence | None = None  # it comes after all of `decoding`
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self.decoding) + (self.prefilling is not None)

    def enqueue(self, seq: Sequence) -> None:
        """A new sequence, at the end of the queue."""
        self.sequences[seq.request_id] = self.waiting[seq.request_id] = seq

    def candidates(self, steps_done: int) -> Iterator[Sequence]:
        """The queue, from its head on; nothing if the head has to wait for others or its own steps in flight."""
        if not self.waiting or self.num_running >= self.max_num_seqs or not self.cache.slots.num_free:
            return
        for seq in self.waiting.values():
            if seq.ready_after > steps_done:
                return
            yield seq

    def has_room(self, seq: Sequence, start: Node | None, overtaken: Seq[Sequence] = ()) -> bool:
        """Whether one of the queue may be admitted, to begin after `start`, while those before it wait.

        A block is left for every running sequence that may still need one: otherwise the one admitted would soon be
        preempted, its prefill wasted. So are a slot and blocks for those that it overtakes.
        """
        ahead = len(overtaken)
        if self.num_running + ahead >= self.max_num_seqs or self.cache.slots.num_free <= ahead:
            return False
        reserve = sum(other.capacity < other.max_computed for other in self.decoding)
        reserve += sum(other.lacks for other in overtaken)
        return self.cache.can_admit(seq.num_known, reserve, start)

    def admit(self, seq: Sequence, start: Node | None, overtaken: Seq[Sequence] = ()) -> list[int] | None:
        """Moves one of the queue, who overtakes those before it, to `prefilling`; gives it a slot and the blocks for
        all its tokens, of which those down to `start` are computed. None when it must wait."""
        num_tokens = seq.num_known
        if not self.has_room(seq, start, overtaken):
            return None
        for other in reversed(overtaken):
            seq.order, other.order = other.order, seq.order
        del self.waiting[seq.request_id]
        seq.slot, blocks = self.cache.admit(seq.request_id, num_tokens, start)
        seq.target = num_tokens
        seq.capacity = self.cache.tokens_in(len(blocks))
        self.prefilling = seq
        return blocks

    def prefilled(self) -> None:
        """The last prefill of `prefilling` is planned; from now on it decodes."""
        assert self.prefilling is not None
        self.decoding.append(self.prefilling)
        self.prefilling = None

    def grow(self, seq: Sequence, num_steps: int) -> list[int]:
        """Blocks so that decoding `seq` can cache one more token, at the cost of whoever is last in order.

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
        self._leave_running(seq, num_steps)
        self.waiting[seq.request_id] = seq
        self.waiting.move_to_end(seq.request_id, last=False)
        seq.reset(ready_after=num_steps)
        self.num_preemptions += 1

    def end(self, seq: Sequence, num_steps: int, failed: bool = False) -> None:
        """Leaves no trace of a sequence but its rows in flight, which are dropped when they arrive, and, unless it
        failed, its cached prefix. num_steps is the number of steps planned so far."""
        if seq.slot:
            self._leave_running(seq, num_steps, failed)
        else:
            del self.waiting[seq.request_id]
        seq.finished = True
        del self.sequences[seq.request_id]

    def _leave_running(self, seq: Sequence, num_steps: int, failed: bool = False) -> None:
        if seq is self.prefilling:
            self.prefilling = None
        else:
            self.decoding.remove(seq)
        if not failed:
            self.prefixes.leaving(seq, num_steps)
        self.cache.release(seq.request_id, failed)
