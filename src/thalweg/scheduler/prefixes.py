"""What plans do for the prefix cache: where a prompt's computing begins, where it is cut, whose states are kept."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from thalweg.cache.manager import CacheManager
from thalweg.cache.node import MISS_REASONS, Match, Node
from thalweg.cache.tiers import TieredTree
from thalweg.core import HostCopies, pack_ids
from thalweg.scheduler.sequence import Sequence, keys_of

Copy = TypeVar("Copy", tuple[int, int], tuple[int, int, int])
_log = logging.getLogger(__name__)


class Prefixes:
    """One plan at a time: `begin`, then what the scheduler decided; `copies` go into the plan.

    A model with states can go on only from a snapshot. Snapshots are taken at positions on a grid of `grid` tokens,
    which are ends of blocks and of the chunks that kernels work in: at the last one of a prompt, so that a token is
    left to compute; where a prompt leaves what the tree knows of it, and so is seen a second time; every `interval`
    tokens of a long prompt; and at every block's end of decoding, where only the latest stays. Prefills write
    those on their way that are a multiple of `chunk` tokens after their start. At others they are cut, and the next
    step copies the states before it goes on, as decoding does. A plan has `most_boundaries` of the former, if that is
    not 0; further ones are left out.
    """

    def __init__(self, cache: CacheManager, grid: int, interval: int, chunk: int, most_boundaries: int = 0) -> None:
        self._cache, self._tree = cache, cache.tree
        self._block_size, self._grid, self._interval, self._chunk = cache.block_size, grid, interval, chunk
        self._most_boundaries = most_boundaries or sys.maxsize
        self._with_states = cache.tree is not None and cache.tree.needs_snapshots
        self.least = grid if self._with_states else 1  # tokens that a further prefill of a step has to have room for
        # Where snapshots of decoding are taken if no block's end marks the place; 0: blocks do.
        self.grid_without_blocks = 0 if cache.blocks.num_blocks or not self._with_states else grid
        self.queries = self.hits = self.host_hits = 0  # prompt tokens looked up, found, fetched from host memory
        self._kept: dict[str, Node] = {}
        self.misses: Counter[str] = Counter(dict.fromkeys(MISS_REASONS, 0))
        self.begin(0)

    def begin(self, step: int) -> None:
        """A new plan."""
        self._step = step
        if self._tree is not None:
            self._tree.step = step
        self.new_blocks: list[tuple[int, int, int]] = []  # as in a plan
        self._boundaries: list[tuple[int, int, int]] = []
        self._snapshots: list[tuple[int, int]] = []
        self._restores: list[tuple[int, int]] = []

    def copies(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
        """The plan's boundaries, snapshots and restores."""
        return self._boundaries, self._snapshots, self._restores

    def host_copies(self) -> HostCopies | None:
        """The plan's copies from and to host memory; once it is sure to run, for they are not told again."""
        return self._tree.copies() if isinstance(self._tree, TieredTree) else None

    def find(self, seq: Sequence) -> Match | None:
        """What is known of a sequence's tokens, at least one of which is left to compute. None: no prefix is kept."""
        if self._tree is None:
            return None
        limit = 0 if _whole(seq) else (seq.num_known - 1) // self._block_size
        return self._tree.find(seq.params.cache_salt, self._key(seq), limit, self._step)

    def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        """Keep what is cached of these tokens, under a new name, longer than all that is not so kept: how many of them
        a prompt that begins so will not compute, until even this has to make room."""
        if self._tree is None or name in self._kept:
            return 0
        keys = keys_of(pack_ids(token_ids), self._block_size)
        match = self._tree.find(salt, lambda block: keys[block], len(keys), sys.maxsize)
        node = match.far or match.node
        if node.parent is None:
            return 0
        self._tree.pin(node)
        self._kept[name] = node
        return node.depth * self._block_size

    def release(self, name: str) -> None:
        """Keep it no longer than anything else; nothing if there is no such name."""
        node = self._kept.pop(name, None)
        if node is not None and self._tree is not None:
            self._tree.unpin(node)

    def fetch(self, match: Match) -> bool:
        """Have this plan bring back what host memory has of a prompt, if there is room."""
        node = match.far
        if node is None or not isinstance(self._tree, TieredTree):
            return False
        if not self._tree.fetch(node, {snapshot for _, snapshot in self._restores}):
            return False
        if node.snapshot:  # which was to hold something else
            self._snapshots = _but(self._snapshots, node.snapshot)
            self._boundaries = _but(self._boundaries, node.snapshot)
        self.host_hits += (node.depth - match.node.depth) * self._block_size
        return True

    def admitted(self, seq: Sequence, match: Match) -> None:
        """`seq` got its slot, and begins where `match` says."""
        tree, found = self._tree, match.node.depth * self._block_size
        assert tree is not None
        seq.computed = found
        if self._with_states:
            if found:
                self._restores.append((seq.slot, tree.use_snapshot(match.node)))
            seq.marks = self._marks(found, seq.target, match.seen * self._block_size)
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

    def _marks(self, found: int, target: int, seen: int) -> list[int]:
        """Positions after `found` where snapshots are wanted, the first one last.

        From the last one on the grid a prompt goes on that is the same, which has a token to compute; from the very
        end, if that is on the grid, a next turn.
        """
        last, branch, end = ((position // self._grid) * self._grid for position in (target - 1, seen, target))
        marks = {last, branch, end}
        first = (found // self._interval + 1) * self._interval
        marks.update(range(first, last - self._interval // 2, self._interval))
        return sorted((mark for mark in marks if mark > found), reverse=True)

    def chunk_end(self, seq: Sequence, budget: int) -> int:
        """Where the next chunk of a prefill ends: at its end if the budget allows, else on the grid if that can be."""
        start, goal = seq.computed, seq.target
        end = min(start + budget, goal)
        if self._tree is not None:
            self._keep(seq, start // self._block_size, self._step)
        if self._with_states:
            if seq.save_at and seq.save_at == start:
                self._save(seq, self._cache.snapshot(seq.request_id, start // self._block_size, self._step))
            goal = next((mark for mark in reversed(seq.marks) if not self._on_the_way(start, mark)), goal)
            end = min(end, goal)
            if end < goal and (on_grid := end // self._grid * self._grid) > start:
                end = on_grid
        return end

    def planned(self, seq: Sequence, start: int) -> None:
        """A prefill is planned from `start` to seq.computed."""
        if self._tree is None:
            return
        end = seq.computed
        self._keep(seq, end // self._block_size, self._step + 1, written=False)
        while seq.marks and seq.marks[-1] <= end:
            mark = seq.marks.pop()
            blocks = mark // self._block_size
            if self._on_the_way(start, mark):
                if len(self._boundaries) >= self._most_boundaries:
                    continue
                snapshot = self._cache.snapshot(seq.request_id, blocks, self._step + 1)
                if snapshot:
                    self._boundaries = [*_but(self._boundaries, snapshot), (seq.slot, mark - start, snapshot)]
            else:  # it was cut there
                seq.save_at = mark
                self._cache.expect_snapshot(seq.request_id, blocks, self._step + 1)

    def _on_the_way(self, start: int, mark: int) -> bool:
        """Whether a prefill from `start` on can write its states at `mark`."""
        return (mark - start) % self._chunk == 0

    def growing(self, seq: Sequence) -> None:
        """`seq` decodes, and its next token, at seq.computed, begins a block."""
        if self._tree is not None and seq.slot:
            self._keep(seq, self._known_blocks(seq), self._step)

    def grown(self, seq: Sequence) -> None:
        """It has that block."""
        if self._with_states and seq.computed % self._grid == 0:
            blocks = seq.computed // self._block_size
            self._save(seq, self._cache.snapshot_latest(seq.request_id, blocks, self._step))

    def _save(self, seq: Sequence, snapshot: int) -> None:
        if snapshot:
            self._snapshots = [*_but(self._snapshots, snapshot), (seq.slot, snapshot)]

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


def _but(copies: list[Copy], snapshot: int) -> list[Copy]:
    """`copies` without one into `snapshot`, which was evicted before it was written, and taken again."""
    return [copy for copy in copies if copy[-1] != snapshot]


def _whole(seq: Sequence) -> bool:
    """Whether something is reported of every token of the prompt, so that all of it must be computed."""
    return seq.wants_prompt_logits or seq.params.prompt_logprobs is not None
