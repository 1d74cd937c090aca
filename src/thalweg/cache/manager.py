"""Who holds which blocks and which slot, and what stays cached of those that ended. No tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from thalweg.cache.blocks import BlockPool, CacheAccountingError
from thalweg.cache.host_pools import HostPools
from thalweg.cache.node import Node
from thalweg.cache.prefix import PrefixTree
from thalweg.cache.slots import SlotPool
from thalweg.cache.snapshots import SnapshotPool
from thalweg.cache.tiers import TieredTree

Key = Callable[[int], bytes]


@dataclass(slots=True)
class _Held:
    """What a running sequence has: a slot, a block table, and its way through the prefix tree."""

    slot: int
    table: list[int]
    tail: Node | None  # the last node of its prefix; None: nothing is kept
    # Nodes that it did not add, while its own block of the same tokens is still in its table.
    twins: list[Node] = field(default_factory=list)
    first: Node | None = None  # the first node that it added
    saved: list[Node] = field(default_factory=list)  # nodes that got a snapshot of its states
    latest: Node | None = None  # where it took its latest snapshot of decoding
    pending: tuple[int, int] | None = None  # (depth, snapshot) of tokens that are not known yet

    @property
    def decoding_snapshot(self) -> bool:
        return self.latest is not None or self.pending is not None


class CacheManager:
    """Accounts for the blocks and the slot of every running sequence, which a caller names by any string.

    num_blocks 0 means a model without paged layers: its sequences need no block, whatever their length. With
    `keep_prefixes`, full blocks outlive their sequence until others need the room; num_snapshots None means that they
    can be used without a snapshot of states. num_host_blocks and num_host_snapshots are the places in host memory for
    what falls out of the device's.
    """

    def __init__(
        self,
        num_blocks: int,
        num_slots: int,
        block_size: int,
        *,
        keep_prefixes: bool = False,
        num_snapshots: int | None = None,
        num_host_blocks: int = 0,
        num_host_snapshots: int = 0,
    ) -> None:
        if num_slots < 1 or block_size < 1:
            raise CacheAccountingError(f"{num_slots} slots, blocks of {block_size} tokens; expected 1 or more of each")
        self.block_size = block_size
        self.blocks = BlockPool(num_blocks)
        self.slots = SlotPool(num_slots)
        self.snapshots = SnapshotPool(num_snapshots or 0)
        stateless = num_snapshots is None
        self.tree: PrefixTree | None = None
        self.host = HostPools(num_host_blocks, num_host_snapshots)
        if keep_prefixes:
            pools = self.blocks, None if stateless else self.snapshots
            tiered = num_host_blocks or num_host_snapshots
            self.tree = TieredTree(*pools, self.host) if tiered else PrefixTree(*pools)
        self._held: dict[str, _Held] = {}
        self._decoding_snapshots = 0

    @property
    def max_tokens(self) -> int:
        """Tokens that one sequence could cache with every block to itself."""
        return self.tokens_in(self.blocks.num_blocks)

    @property
    def num_kept(self) -> int:
        """Blocks of ended sequences, which are free for whoever needs them."""
        return self.tree.num_evictable if self.tree is not None and self.blocks.num_blocks else 0

    @property
    def num_available(self) -> int:
        """Blocks that are free, or would be if prefixes were evicted."""
        return self.blocks.num_free + self.num_kept

    def tokens_in(self, num_blocks: int) -> int:
        """Tokens that num_blocks blocks hold; no bound for a model without paged layers."""
        return num_blocks * self.block_size if self.blocks.num_blocks else sys.maxsize

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that num_tokens tokens of one sequence fill, the last perhaps in part."""
        return -(-num_tokens // self.block_size) if self.blocks.num_blocks else 0

    def can_admit(self, num_tokens: int, reserve: int = 0, start: Node | None = None) -> bool:
        """Whether a slot and the blocks for num_tokens can be had, and `reserve` blocks would be left after. `start`:
        where in the tree the sequence would begin."""
        shared = kept = 0
        if start is not None and self.tree is not None and self.blocks.num_blocks:
            shared, kept = start.depth, self.tree.unheld(start)
        needed = self.blocks_for(num_tokens) - shared + reserve
        return self.slots.num_free > 0 and needed <= self.num_available - kept

    def admit(self, seq: str, num_tokens: int, start: Node | None = None) -> tuple[int, list[int]]:
        """Gives `seq` a slot and the blocks for num_tokens: (slot, its block table so far). The first blocks are
        those down to `start`, which others may read too.

        Raises CacheAccountingError when can_admit() says no, or `seq` is admitted already.
        """
        if seq in self._held:
            raise CacheAccountingError(f"sequence {seq!r} was admitted twice")
        if not self.can_admit(num_tokens, start=start):
            raise CacheAccountingError(
                f"sequence {seq!r} of {num_tokens} tokens was admitted; "
                f"{self.slots.num_free} slots and {self.num_available} blocks are free"
            )
        table: list[int] = []
        if start is not None and self.tree is not None:
            self.tree.hold(start)
            table = self.tree.path_blocks(start) if self.blocks.num_blocks else []
        table += self._allocate(self.blocks_for(num_tokens) - len(table))
        slot = self.slots.allocate()
        self._held[seq] = _Held(slot, table, start)
        return slot, table[:]

    def grow(self, seq: str, num_tokens: int) -> list[int] | None:
        """The blocks `seq` gets so that it holds num_tokens, at the end of its table; [] if it has enough.

        None, and nothing changes, when too few can be had.
        """
        held = self._of(seq)
        need = self.blocks_for(num_tokens) - len(held.table)
        if need <= 0:
            return []
        if need > self.num_available:
            return None
        new = self._allocate(need)
        held.table.extend(new)
        return new

    def release(self, seq: str, failed: bool = False) -> None:
        """Frees the slot of `seq`, and its blocks but for those in the tree. Raises CacheAccountingError when it has
        none. With `failed`, what it added to the tree is taken out again."""
        held = self._of(seq)
        kept = 0
        if held.tail is not None and self.tree is not None:
            if held.decoding_snapshot:
                self._decoding_snapshots -= 1
            if held.pending is not None:
                self.snapshots.free(held.pending[1])
            if failed:
                self._forget(held, self.tree)
            self.blocks.free([held.table[node.depth - 1] for node in held.twins])
            kept = held.tail.depth
            self.tree.let_go(held.tail)
        self.blocks.free(held.table[kept:])
        self.slots.free(held.slot)
        del self._held[seq]

    # What is kept of a running sequence

    def keep(self, seq: str, key: Key, num_blocks: int, ready: int, *, written: bool = True) -> list[tuple[int, int]]:
        """Put the first num_blocks blocks of `seq`, whose tokens are key(i), into the tree; plans from number `ready`
        on may read them.

        If the tree has a block of these tokens already, `seq` reads that one from now on and its own is freed: such
        (index in its table, block) are returned. Not `written`: the plan that is being made writes some of the blocks,
        so that is left to the next call.
        """
        held = self._of(seq)
        while held.tail is not None and self.tree is not None and held.tail.depth < num_blocks and not held.tail.gone:
            i = held.tail.depth
            own = held.table[i] if self.blocks.num_blocks else 0
            held.tail, new = self.tree.extend(held.tail, key(i), own, ready)
            if new:
                held.first = held.first or held.tail
            elif own:
                held.twins.append(held.tail)
            if held.pending is not None and held.pending[0] == held.tail.depth:
                snapshot, held.pending = held.pending[1], None
                self._attach_latest(held, held.tail, snapshot, ready)
        if not written:
            return []
        twins, held.twins = held.twins, []
        changed = [(node.depth - 1, node.block) for node in twins]
        for index, block in changed:
            self.blocks.free((held.table[index],))
            held.table[index] = block
        return changed

    def expect_snapshot(self, seq: str, num_blocks: int, step: int) -> None:
        """Plan `step` may take a snapshot of `seq` after num_blocks blocks, which others may as well wait for."""
        node = self._node(seq, num_blocks)
        if node is not None:
            node.due = step

    def snapshot(self, seq: str, num_blocks: int, ready: int) -> int:
        """A snapshot for the states of `seq` after num_blocks blocks, all of which are in the tree, which plans from
        number `ready` on may restore; 0 if there is one there, or none to be had."""
        node = self._node(seq, num_blocks)
        if node is None or self.tree is None:
            return 0
        self.tree.pass_by(node)
        snapshot = self.tree.take_snapshot(node)
        if snapshot and self.tree.attach(node, snapshot, ready):
            self._of(seq).saved.append(node)
        return snapshot

    def _node(self, seq: str, num_blocks: int) -> Node | None:
        """Where the prefix of `seq` has num_blocks blocks, unless there is a snapshot."""
        node = self._of(seq).tail
        while node is not None and node.depth > num_blocks:
            node = node.parent
        if node is None or node.depth != num_blocks or node.gone or node.snapshot:
            return None
        return node

    def snapshot_latest(self, seq: str, num_blocks: int, ready: int) -> int:
        """A snapshot for the states of `seq`, which decodes, after num_blocks blocks; some of the tokens may not be
        known yet. It takes the place of the one before, unless another sequence began there; 0 as above, and when
        half of the snapshots are in such use."""
        held = self._of(seq)
        tail, latest = held.tail, held.latest
        if tail is None or self.tree is None or tail.gone or held.pending is not None:
            return 0
        if tail.depth == num_blocks and tail.snapshot:
            return 0
        if not held.decoding_snapshot and 2 * self._decoding_snapshots >= self.snapshots.num_snapshots:
            return 0
        if latest is not None and latest.snapshot and not latest.reuses and not latest.gone:
            snapshot = self.tree.detach_snapshot(latest)
        else:
            snapshot = self.tree.take_snapshot(tail, self.tree.is_minor(tail, num_blocks))
        if not snapshot:
            return 0
        if not held.decoding_snapshot:
            self._decoding_snapshots += 1
        if tail.depth == num_blocks:
            self._attach_latest(held, tail, snapshot, ready)
        else:
            held.pending = num_blocks, snapshot
        return snapshot

    def check_idle(self) -> None:
        """Raises CacheAccountingError that lists what is still taken, and not merely kept. For when no sequence
        should be left."""
        taken = self.blocks.num_blocks - self.blocks.num_free
        kept = self.tree.num_nodes if self.tree is not None and self.blocks.num_blocks else 0
        leaked = taken != self.num_kept or kept != self.num_kept
        saved = 0 if self.tree is None else len(self.tree.saved)
        if saved + self.snapshots.num_free != self.snapshots.num_snapshots:
            raise CacheAccountingError(f"leaked at idle: snapshots {self.snapshots.taken()}, {saved} of them in use")
        if leaked or self.slots.num_free < self.slots.num_slots or self._held or self._decoding_snapshots:
            blocks, slots = self.blocks.taken() if leaked else [], self.slots.taken()
            raise CacheAccountingError(
                f"leaked at idle: blocks {blocks}, slots {slots}, held by sequences {sorted(self._held)}"
            )

    def _attach_latest(self, held: _Held, node: Node, snapshot: int, ready: int) -> None:
        assert self.tree is not None
        if self.tree.attach(node, snapshot, ready):
            if self.tree.is_minor(node, node.depth):
                self.tree.mark_minor(node)
            held.latest = node
            held.saved.append(node)
        elif held.latest is None:
            self._decoding_snapshots -= 1

    def _forget(self, held: _Held, tree: PrefixTree) -> None:
        for node in held.saved:
            tree.forget_states(node)
        if held.first is not None:
            tree.forget(held.first)

    def _allocate(self, n: int) -> list[int]:
        while self.tree is not None and self.blocks.num_free < n:
            self.tree.evict_block()
        return self.blocks.allocate(n)

    def _of(self, seq: str) -> _Held:
        held = self._held.get(seq)
        if held is None:
            raise CacheAccountingError(f"sequence {seq!r} holds nothing; it was never admitted or is released")
        return held
