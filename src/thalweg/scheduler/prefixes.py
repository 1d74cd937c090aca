"""What plans do for the prefix cache: where a prompt's computing begins, where it is cut, whose states are kept."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from thalweg.cache.manager import CacheManager
from thalweg.cache.prefix import MISS_REASONS, Match
from thalweg.scheduler.sequence import Sequence

_log = logging.getLogger(__name__)


class Prefixes:
    """One plan at a time: `begin`, then what the scheduler decided; `snapshots` and `restores` go into the plan.

    A model with states can go on only from a snapshot. Snapshots are taken at positions on a grid of `grid` tokens,
    which are ends of blocks and of the chunks that kernels work in: at the last one of a prompt, so that a token is
    left to compute; where a prompt leaves what the tree knows of it, and so is seen a second time; about every
    `interval` tokens of a long prompt; and at every block's end of decoding, where only the latest stays. A copy is
    made ahead of the step that would change the states, so a prefill is cut where one is wanted.
    """

    def __init__(self, cache: CacheManager, grid: int, interval: int) -> None:
        self._cache, self._tree = cache, cache.tree
        self._block_size, self._grid, self._interval = cache.block_size, grid, interval
        self._with_states = cache.tree is not None and cache.tree.needs_snapshots
        self.least = grid if self._with_states else 1  # tokens that a further prefill of a step has to have room for
        self.snapshots: list[tuple[int, int]] = []
        self.restores: list[tuple[int, int]] = []
        self.new_blocks: list[tuple[int, int, int]] = []  # as in a plan
        self.queries = self.hits = 0  # prompt tokens looked up, and found
        self.misses: Counter[str] = Counter(dict.fromkeys(MISS_REASONS, 0))
        self._step = 0

    def begin(self, step: int) -> None:
        """A new plan."""
        self._step, self.snapshots, self.restores, self.new_blocks = step, [], [], []

    def find(self, seq: Sequence) -> Match | None:
        """What is known of a sequence's tokens, at least one of which is left to compute. None: no prefix is kept."""
        if self._tree is None:
            return None
        limit = 0 if _whole(seq) else (seq.num_known - 1) // self._block_size
        return self._tree.find(seq.params.cache_salt, self._key(seq), limit, self._step)

    def admitted(self, seq: Sequence, match: Match) -> None:
        """`seq` got its slot, and begins where `match` says."""
        tree, found = self._tree, match.node.depth * self._block_size
        assert tree is not None
        seq.computed = seq.saved = found
        if self._with_states:
            if found:
                self.restores.append((seq.slot, tree.use_snapshot(match.node)))
            last, branch = seq.target - 1, match.seen * self._block_size
            marks = {position // self._grid * self._grid for position in (last, branch)}
            seq.marks = sorted((mark for mark in marks if mark > found), reverse=True)
        if seq.ready_after:  # it was preempted, and counted before
            return
        seq.num_cached = found
        self.queries += seq.num_prompt
        self.hits += found
        reason = "prompt_wanted" if _whole(seq) else match.reason
        if not found:
            self.misses[reason] += 1
        if _log.isEnabledFor(logging.DEBUG):
            known = match.seen * self._block_size
            _log.debug(
                "request %s: %d of %d prompt tokens are cached, %d were seen; the rest is %s",
                *(seq.request_id, found, seq.num_prompt, known, reason),
            )

    def chunk_end(self, seq: Sequence, budget: int) -> int:
        """Where the next chunk of a prefill ends: at the next mark if the budget allows, else on the grid if it can."""
        start, goal = seq.computed, seq.target
        end = min(start + budget, goal)
        if self._tree is not None:
            self._keep(seq, start // self._block_size, self._step)
        if self._with_states:
            if seq.save_at and seq.save_at == start:
                self._save(seq, self._cache.snapshot(seq.request_id, start // self._block_size))
                seq.saved, seq.save_at = start, 0
            goal = seq.marks[-1] if seq.marks else goal
            end = min(end, goal, seq.saved + self._interval)
            if end < goal and (on_grid := end // self._grid * self._grid) > start:
                end = on_grid
        return end

    def planned(self, seq: Sequence) -> None:
        """A prefill is planned up to seq.computed."""
        if self._tree is None:
            return
        end = seq.computed
        self._keep(seq, end // self._block_size, self._step + 1, written=False)
        if not self._with_states or end == seq.target or end % self._grid:
            return
        marked = bool(seq.marks) and seq.marks[-1] == end
        if marked:
            seq.marks.pop()
        if marked or 2 * (end - seq.saved) >= self._interval:
            seq.save_at = end
            self._cache.expect_snapshot(seq.request_id, end // self._block_size, self._step + 1)

    def grown(self, seq: Sequence) -> None:
        """`seq` decodes, and its next token, at seq.computed, begins a block."""
        if self._tree is None:
            return
        self._keep(seq, self._known_blocks(seq), self._step)
        if self._with_states and seq.computed % self._grid == 0:
            blocks = seq.computed // self._block_size
            self._save(seq, self._cache.snapshot_latest(seq.request_id, blocks))

    def _save(self, seq: Sequence, snapshot: int) -> None:
        if snapshot:
            # With few snapshots one may be evicted again before it is written.
            self.snapshots = [pair for pair in self.snapshots if pair[1] != snapshot] + [(seq.slot, snapshot)]

    def leaving(self, seq: Sequence, num_steps: int) -> None:
        """`seq` gives up its slot; keep what the num_steps steps planned so far compute and whose tokens are known."""
        if self._tree is not None:
            self._cache.keep(seq.request_id, self._key(seq), self._known_blocks(seq), num_steps)

    def _known_blocks(self, seq: Sequence) -> int:
        return min(seq.computed, seq.num_known) // self._block_size

    def _keep(self, seq: Sequence, num_blocks: int, ready: int, *, written: bool = True) -> None:
        changed = self._cache.keep(seq.request_id, self._key(seq), num_blocks, ready, written=written)
        self.new_blocks.extend((seq.slot, index, block) for index, block in changed)

    def _key(self, seq: Sequence) -> Callable[[int], bytes]:
        return lambda block: seq.key(block, self._block_size)


def _whole(seq: Sequence) -> bool:
    """Whether something is reported of every token of the prompt, so that all of it must be computed."""
    return seq.wants_prompt_logits or seq.params.prompt_logprobs is not None
