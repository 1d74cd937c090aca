"""The prefix tree with a second tier, in host memory: what falls out of the device's pools goes there, and comes back.

Copies are part of plans, which first save, then fetch. What a plan saves was complete before it, and what it fetches
may be used by its own rows: a device that copies asynchronously makes them wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from heapq import heappop

from thalweg.cache.blocks import BlockPool
from thalweg.cache.host_pools import HostPools
from thalweg.cache.node import Node
from thalweg.cache.prefix import PrefixTree, age
from thalweg.cache.snapshots import SnapshotPool
from thalweg.core import HostCopies


class TieredTree(PrefixTree):
    """Nodes that lose their block stay in the tree as long as host memory has it, below those of the device. They are
    given up as on the device, the ends of branches and the least recently used first; before them go copies of what
    the device has too, and first of all snapshots that a conversation went past."""

    def __init__(self, blocks: BlockPool, snapshots: SnapshotPool | None, host: HostPools) -> None:
        super().__init__(blocks, snapshots)
        self.host = host
        self.keeps_displaced = host.snapshots.num_snapshots > 0
        self._far_leaves: list[tuple[int, int, Node]] = []  # as _leaves, of nodes in host memory alone
        self._block_copies: OrderedDict[Node, None] = OrderedDict()  # whose block is in both tiers
        # Nodes with a snapshot in host memory, each in one of these: that a path went past, that are in both tiers, all
        # others.
        self._snapshots_passed: OrderedDict[Node, None] = OrderedDict()
        self._snapshot_copies: OrderedDict[Node, None] = OrderedDict()
        self._snapshots_alone: OrderedDict[Node, None] = OrderedDict()
        # Whose places the next plan reads, and which can therefore not be given to others before it.
        self._blocks_read: list[Node] = []
        self._snapshots_read: dict[Node, bool] = {}  # and whether a path went past it

    def fetch(self, node: Node, restored: Collection[int] = ()) -> bool:
        """Give `node` and all above it blocks, and `node` a snapshot, which the next plan fills. False if there is no
        room but for snapshots that this plan has `restored`, which it does after it fetches."""
        self.hold(node)
        done = self._fetch(node, restored)
        self.let_go(node)  # which makes them the most recently used
        return done

    def copies(self) -> HostCopies | None:
        """What the plan that is now complete saves and fetches."""
        copies = self.host.take()
        for node in self._blocks_read:
            if node.host_block and node.here:
                self._block_copies[node] = None
        read, self._blocks_read, self._snapshots_read = self._snapshots_read, [], {}
        for node, passed in read.items():
            if node.host_snapshot:
                alone = self._snapshots_passed if passed else self._snapshots_alone
                self._list(node, self._snapshot_copies if node.snapshot and not passed else alone)
        return copies

    def attach(self, node: Node, snapshot: int, ready: int) -> bool:
        done = super().attach(node, snapshot, ready)
        if done and node.host_snapshot:
            self._list(node, self._snapshot_copies)
        return done

    def pass_by(self, node: Node) -> None:
        super().pass_by(node)
        for above in _path(node):
            if above.host_snapshot and above is not node and _is_past(above):
                self._list(above, self._snapshots_passed)
                if above in self._snapshots_read:
                    self._snapshots_read[above] = True

    def forget_states(self, node: Node) -> None:
        super().forget_states(node)
        if node.host_snapshot:
            self._drop_host_snapshot(node)

    # For images of the tree

    @property
    def has_blocks(self) -> bool:
        return self._blocks.num_blocks > 0

    def roots(self) -> list[Node]:
        return list(self._roots.values())

    def root(self, salt: str) -> Node:
        return self._roots.setdefault(salt, Node(None, salt.encode(), 0, 0))

    def rank(self, node: Node) -> int:
        """The higher, the later it is given up."""
        return age(node)

    def adopt(self, parent: Node, key: bytes, stamp: int, snapshot: int) -> Node:
        """A node that host memory has in its next free place, and a snapshot, unless 0, if there is room."""
        node = parent.children[key] = Node(parent, key, 0, 0)
        node.stamp = stamp
        if parent.parent is None:
            self._first[key] += 1
        if self.has_blocks:
            node.here = False
            (node.host_block,) = self.host.blocks.allocate(1)
        else:
            parent.near += 1
            self.num_nodes += 1
            self.num_evictable += 1
        if snapshot and self.host.snapshots.num_free:
            node.host_snapshot = self.host.snapshots.allocate()
        return node

    def adopted(self, node: Node) -> None:
        """All nodes are there. To be called for each, the least worth first."""
        if node.host_snapshot:
            self._list(node, self._snapshots_alone)
        if not node.gone and not node.children:
            self._offer(node)

    def _fetch(self, node: Node, restored: Collection[int]) -> bool:
        missing = [each for each in _path(node) if not each.here]
        if len(missing) > self._blocks.num_free + self.num_evictable:
            return False
        if self._snapshots is not None and not node.snapshot:
            self._list(node)  # it must not make room for what it displaces
            snapshot = self.take_snapshot(node)
            if snapshot in restored:
                self._snapshots.free(snapshot)
                snapshot = 0
            if not snapshot:
                self._list(node, self._snapshots_alone)
                return False
            super().attach(node, snapshot, self.step)
            self.host.fetches[1][snapshot] = node.host_snapshot
            self._snapshots_read[node] = False
        while self._blocks.num_free < len(missing):
            self.evict_block()
        for each, block in zip(reversed(missing), self._blocks.allocate(len(missing)), strict=True):
            assert each.parent is not None
            each.block, each.here, each.ready = block, True, self.step
            each.parent.near += 1
            self.num_nodes += 1
            self.host.fetches[0][block] = each.host_block
            self._blocks_read.append(each)
        return True

    # What the device's tier gives up

    def _give_up(self, node: Node) -> Node | None:
        if node.snapshot:
            self.drop_snapshot(node)
        leads_nowhere = self.needs_snapshots and not (node.children or node.host_snapshot)
        if leads_nowhere or node.ready > self.step or not self._save_block(node):
            return self._remove_all(node)
        self._free(node)
        node.block, node.here = 0, False
        self.num_nodes -= 1
        self.num_evictable -= 1
        above = node.parent
        assert above is not None
        above.near -= 1
        self._offer(node)
        return above if above.parent is not None and above.refs == 0 else None

    def _remove_all(self, node: Node) -> Node | None:
        """As _remove, with what is below."""
        if not node.children:
            return self._remove(node)
        above = node.parent
        assert above is not None
        self.forget(node)
        if above.parent is None:
            self._drop_root(above)
            return None
        return above if above.refs == 0 else None

    def _save_block(self, node: Node) -> bool:
        if node.host_block:
            self._block_copies.pop(node, None)
            return True
        if not self._make_room_for_block():
            return False
        (node.host_block,) = self.host.blocks.allocate(1)
        self.host.saves[0][node.host_block] = node.block
        return True

    def _save(self, node: Node) -> None:
        if node.host_snapshot or node.written >= self.step or node.gone:
            return
        passed = node in self.saved.passed
        path = [each for each in _path(node) if each.host_snapshot]
        victim: Node | None = None
        if len(path) >= self.host.snapshots.most_per_path:
            own = set(path)
            victim = next((each for each in self._host_snapshots(passed) if each in own), None)
        elif not self.host.snapshots.num_free:
            victim = next(self._host_snapshots(passed or node in self.saved.minor), None)
        if victim is not None:
            self._drop_host_snapshot(victim)
        if not self.host.snapshots.num_free:
            return
        node.host_snapshot = self.host.snapshots.allocate()
        self.host.saves[1][node.host_snapshot] = node.snapshot
        self._list(node, self._snapshots_passed if passed else self._snapshots_alone)

    def _came_back(self, node: Node) -> None:
        self._block_copies[node] = None

    # What the host's tier gives up

    def _host_snapshots(self, lesser: bool) -> Iterator[Node]:
        """Nodes whose snapshot host memory would give up for another, or for a `lesser` one, in that order."""
        yield from self._snapshots_passed
        yield from self._snapshot_copies
        if not lesser:
            yield from (node for node in self._snapshots_alone if not node.pins)
            yield from self._snapshots_alone

    def _list(self, node: Node, among: OrderedDict[Node, None] | None = None) -> None:
        for nodes in (self._snapshots_passed, self._snapshot_copies, self._snapshots_alone):
            nodes.pop(node, None)
        if among is not None and node not in self._snapshots_read:
            among[node] = None

    def _make_room_for_block(self) -> bool:
        blocks = self.host.blocks
        if not blocks.num_free and self._block_copies:
            node, _ = self._block_copies.popitem(last=False)
            self.host.free_block(node.host_block)
            node.host_block = 0
        while not blocks.num_free and self._far_leaves:
            stamp, _, node = heappop(self._far_leaves)
            if not (node.here or node.gone or node.refs or node.children) and age(node) == stamp:
                above = self._remove(node)
                if above is not None:
                    self._offer(above)
        return blocks.num_free > 0

    def _drop_host_snapshot(self, node: Node) -> None:
        self._list(node)
        self.host.free_snapshot(node.host_snapshot)
        node.host_snapshot = 0
        if not (node.gone or node.refs or node.children or node.snapshot):
            self._offer(node)

    def _leave_host(self, node: Node) -> None:
        if node.host_snapshot:
            self._drop_host_snapshot(node)
        if node.host_block:
            self._block_copies.pop(node, None)
            self.host.free_block(node.host_block)
            node.host_block = 0

    # Inside

    def _free(self, node: Node) -> None:
        self.host.fetches[0].pop(node.block, None)
        super()._free(node)

    def detach_snapshot(self, node: Node) -> int:
        snapshot = super().detach_snapshot(node)
        if node.host_snapshot and node not in self._snapshots_passed:
            self._list(node, self._snapshots_alone)
        return snapshot

    def _offer(self, node: Node) -> None:
        while not node.here:
            if node.children:
                return
            if not self.needs_snapshots or node.host_snapshot:
                self._push(self._far_leaves, node, self.host.blocks.num_blocks)
                return
            above = self._remove(node)  # it leads to nothing that could be used
            if above is None:
                return
            node = above
        super()._offer(node)


def _is_past(node: Node) -> bool:
    """Whether a path that continues from `node` leaves it of likely no more use."""
    return node.reuses <= 1 and len(node.children) == 1 and not node.pins


def _path(node: Node) -> Iterator[Node]:
    """`node` and those above it, but for the root."""
    while node.parent is not None:
        yield node
        node = node.parent
