"""The prefix tree: full blocks of what was computed, some with a snapshot of the states at their end.

A node is a block of tokens after all the blocks above it, so it stands for a whole prefix; its key is the tokens
themselves, and each salt has a root of its own. A sequence that runs holds every node of its prefix; the others wait
to be shared or, oldest first and from the ends of branches, to be evicted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from thalweg.cache.blocks import BlockPool, CacheAccountingError
from thalweg.cache.node import Match, MissReason, Node
from thalweg.cache.saving import SavingTree
from thalweg.cache.snapshots import SnapshotPool

PINNED = 1 << 60  # what pinned nodes were used later than all others
GHOSTS = 1 << 16  # evicted prefixes that are remembered, to tell them from new ones


class PrefixTree(SavingTree):
    """Nodes own their blocks and snapshots, which come from and go back to the pools.

    `snapshots` None: the model keeps no state, so that a prefix can be used at every block. Without blocks in `blocks`
    nodes have none, and live only as long as they lead to a snapshot.
    """

    def __init__(self, blocks: BlockPool, snapshots: SnapshotPool | None) -> None:
        super().__init__(snapshots)
        self._blocks = blocks
        self._roots: dict[str, Node] = {}
        self._first: Counter[bytes] = Counter()  # roots that have this first block
        self._leaves: list[tuple[int, int, Node]] = []  # heap of nodes that may be evicted, some of them no longer
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._clock = 0
        self._pushed = 0
        self.num_nodes = 0  # on the device
        self.num_evictable = 0  # those of them that no sequence holds

    def find(self, salt: str, key: Callable[[int], bytes], limit: int, step: int) -> Match:
        """Follow a prompt whose block i is key(i), `limit` blocks at most, for plan `step`. Changes nothing."""
        node = self._roots.get(salt) or Node(None, salt.encode(), 0, 0)
        usable = best = node
        here, soon, lost = True, False, False
        for i in range(limit):
            child = node.children.get(key(i))
            if child is None:
                break
            node = child
            here = here and child.here
            if self._snapshots is None:
                later = child.ready > step
                if not later:
                    usable, best = child if here else usable, child
            else:
                later = child.due > step
                lost = lost or child.lost
                if (child.snapshot or child.host_snapshot) and not later:
                    best, soon, lost = child, False, False
                    usable = child if here and child.snapshot else usable
            soon = soon or later
        reason: MissReason
        if limit == 0:
            reason = "too_short"
        elif lost or (node.depth < limit and hash((node.hash, key(node.depth))) in self._ghosts):
            reason = "evicted"
        elif node is not best:
            reason = "no_snapshot"
        elif node.depth == 0 and self._first[key(0)]:
            reason = "other_salt"
        else:
            reason = "unseen"
        return Match(usable, None if best is usable else best, node.depth, soon, reason)

    def path_blocks(self, node: Node) -> list[int]:
        """Blocks from the root to `node`; 0 for each if the model has none."""
        blocks = []
        while node.parent is not None:
            blocks.append(node.block)
            node = node.parent
        return blocks[::-1]

    def unheld(self, node: Node) -> int:
        """How many nodes from the root to `node` nobody holds: they could be evicted, and will not be once held."""
        count = 0
        while node.parent is not None and node.refs == 0:
            count, node = count + 1, node.parent
        return count

    def hold(self, node: Node) -> None:
        """A sequence begins from `node`: nothing above it may be evicted."""
        while True:
            if node.refs == 0 and node.parent is not None and node.here:
                self.num_evictable -= 1
            node.refs += 1
            if node.parent is None:
                self._roots[node.key.decode()] = node
                return
            node = node.parent

    def extend(self, tail: Node, key: bytes, block: int, ready: int) -> tuple[Node, bool]:
        """The node after `tail`, which the holder of `tail` now holds too. Whether `block` is its block: another
        sequence may have put it there."""
        child = tail.children.get(key)
        if new := child is None:
            child = tail.children[key] = Node(tail, key, block, ready)
            if tail.parent is None:
                self._first[key] += 1
        elif not child.here:  # it was in host memory alone
            new, child.block, child.here, child.ready = True, block, True, ready
            self._came_back(child)
        elif child.refs == 0:
            self.num_evictable -= 1
        if new:
            self.num_nodes += 1
            tail.near += 1
        child.refs += 1
        return child, new

    def let_go(self, tail: Node) -> None:
        """A sequence that held everything down to `tail` is over."""
        self._clock += 1
        node = tail
        while node.parent is not None:
            node.refs -= 1
            node.stamp = self._clock
            above = node.parent
            if node.refs == 0:
                if node.gone:
                    self._free(node)
                else:
                    self.num_evictable += node.here
                    self._offer(node)
            node = above
        node.refs -= 1
        self._drop_root(node)

    def pin(self, node: Node) -> None:
        """Give up `node` and what it needs after all others; until as many calls of `unpin`."""
        node.pins += 1
        self._pins_changed(node)

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        self._pins_changed(node)

    def _pins_changed(self, node: Node) -> None:
        if node.gone:
            return
        if node.snapshot:
            self.saved.move(node, self.saved.major)
        if node.refs == 0:
            self._offer(node)

    def forget(self, node: Node) -> None:
        """Take `node` and all below it out of the tree. What sequences hold of it is freed when they let go."""
        assert node.parent is not None
        if node.gone:
            return
        self._detach(node)
        below = [node]
        while below:
            each = below.pop()
            below += each.children.values()
            each.gone = True
            self.num_nodes -= each.here
            self.forget_snapshot(each)
            self._leave_host(each)
            if each.refs == 0:
                self.num_evictable -= each.here
                self._free(each)

    def evict_block(self) -> None:
        """Evict the end of the branch that was used least recently. Raises CacheAccountingError if all is held."""
        while self._leaves:
            stamp, _, node = heappop(self._leaves)
            if node.here and not (node.gone or node.refs or node.near) and age(node) == stamp:
                above = self._give_up(node)
                if above is not None:
                    self._offer(above)
                return
        raise CacheAccountingError("no node can be evicted")

    # What a tree with a further tier adds

    def _give_up(self, node: Node) -> Node | None:
        """Free the block of `node`, which nobody holds and nothing on the device is below: what is above it, if nobody
        holds that either."""
        return self._remove(node)

    def _came_back(self, node: Node) -> None:
        """`node` is on the device again."""

    def _leave_host(self, node: Node) -> None:
        """`node` is gone."""

    # Inside

    def _lost_snapshot(self, node: Node) -> None:
        if not (self._blocks.num_blocks or node.refs or node.gone):
            self._offer(node)

    def _offer(self, node: Node) -> None:
        """`node`, which nobody holds, may be evicted if nothing is below it; at once if it is of no use, and then what
        is above it likewise."""
        while not (node.children or self._blocks.num_blocks or node.snapshot or node.host_snapshot):
            above = self._remove(node)
            if above is None:
                return
            node = above
        if not node.near:
            self._push(self._leaves, node, self.num_nodes)

    def _push(self, leaves: list[tuple[int, int, Node]], node: Node, about: int) -> None:
        """Put `node` into a heap of leaves, of which `about` are not out of date."""
        self._pushed += 1
        heappush(leaves, (age(node), self._pushed, node))
        if len(leaves) > 64 + 2 * about:
            leaves[:] = [e for e in leaves if not (e[2].gone or e[2].refs) and age(e[2]) == e[0]]
            heapify(leaves)

    def _remove(self, node: Node) -> Node | None:
        """Take a leaf that nobody holds out of the tree: what is above it, if nobody holds that either."""
        parent = node.parent
        assert parent is not None
        self._detach(node)
        node.gone = True
        self.num_nodes -= node.here
        self.num_evictable -= node.here
        self.forget_snapshot(node)
        self._leave_host(node)
        self._free(node)
        self._ghosts[node.hash] = None
        if len(self._ghosts) > GHOSTS:
            self._ghosts.popitem(last=False)
        if parent.parent is None:
            self._drop_root(parent)
            return None
        return parent if parent.refs == 0 else None

    def _detach(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.key]
        node.parent.near -= node.here
        if node.depth == 1:
            self._first[node.key] -= 1
            if not self._first[node.key]:
                del self._first[node.key]

    def _free(self, node: Node) -> None:
        if node.block:
            self._blocks.free((node.block,))

    def _drop_root(self, root: Node) -> None:
        salt = root.key.decode()
        if root.refs == 0 and not root.children and self._roots.get(salt) is root:
            del self._roots[salt]


def age(node: Node) -> int:
    """When `node` was let go last, for the order of eviction."""
    return node.stamp + PINNED if node.pins else node.stamp
