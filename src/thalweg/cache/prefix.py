"""The prefix tree: full blocks of what was computed, some with a snapshot of the states at their end.

A node is a block of tokens after all the blocks above it, so it stands for a whole prefix; its key is the tokens
themselves, and each salt has a root of its own. A sequence that runs holds every node of its prefix; the others wait
to be shared or, oldest first and from the ends of branches, to be evicted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import chain

from thalweg.cache.blocks import BlockPool, CacheAccountingError
from thalweg.cache.node import Match, MissReason, Node
from thalweg.cache.snapshots import SnapshotPool

PATH_SHARE = 4  # one path, from the root to a node, has at most a quarter of the snapshots (2 at least)
GHOSTS = 1 << 16  # evicted prefixes that are remembered, to tell them from new ones


class PrefixTree:
    """Nodes own their blocks and snapshots, which come from and go back to the pools.

    `snapshots` None: the model keeps no state, so that a prefix can be used at every block. Without blocks in `blocks`
    nodes have none, and live only as long as they lead to a snapshot.
    """

    def __init__(self, blocks: BlockPool, snapshots: SnapshotPool | None) -> None:
        self._blocks, self._snapshots = blocks, snapshots
        self._roots: dict[str, Node] = {}
        self._first: Counter[bytes] = Counter()  # roots that have this first block
        # Nodes with a snapshot, least recently used first, in the order in which they are given up: those that paths
        # went past, those that are little more than the one above them, all others.
        self._passed: OrderedDict[Node, None] = OrderedDict()
        self._minor: OrderedDict[Node, None] = OrderedDict()
        self._major: OrderedDict[Node, None] = OrderedDict()
        self._leaves: list[tuple[int, int, Node]] = []  # heap of nodes that may be evicted, some of them no longer
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._clock = 0
        self._pushed = 0
        self.num_nodes = 0
        self.num_evictable = 0  # nodes that no sequence holds

    def find(self, salt: str, key: Callable[[int], bytes], limit: int, step: int) -> Match:
        """Follow a prompt whose block i is key(i), `limit` blocks at most, for plan `step`. Changes nothing."""
        node = self._roots.get(salt) or Node(None, salt.encode(), 0, 0)
        usable, soon, lost = node, False, False
        for i in range(limit):
            child = node.children.get(key(i))
            if child is None:
                break
            node = child
            if self._snapshots is None:
                later = child.ready > step
                usable = usable if later else child
            else:
                later = child.due > step
                lost = lost or child.lost
                if child.snapshot and not later:
                    usable, soon, lost = child, False, False
            soon = soon or later
        reason: MissReason
        if limit == 0:
            reason = "too_short"
        elif lost or (node.depth < limit and hash((node.hash, key(node.depth))) in self._ghosts):
            reason = "evicted"
        elif node is not usable:
            reason = "no_snapshot"
        elif node.depth == 0 and self._first[key(0)]:
            reason = "other_salt"
        else:
            reason = "unseen"
        return Match(usable, node.depth, soon, reason)

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
            if node.refs == 0 and node.parent is not None:
                self.num_evictable -= 1
            node.refs += 1
            if node.parent is None:
                self._roots[node.key.decode()] = node
                return
            node = node.parent

    def extend(self, tail: Node, key: bytes, block: int, ready: int) -> tuple[Node, bool]:
        """The node after `tail`, which the holder of `tail` now holds too. Whether it is new, and `block` its own:
        another sequence may have put it there."""
        child = tail.children.get(key)
        if new := child is None:
            child = tail.children[key] = Node(tail, key, block, ready)
            self.num_nodes += 1
            if tail.parent is None:
                self._first[key] += 1
        elif child.refs == 0:
            self.num_evictable -= 1
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
                    self.num_evictable += 1
                    self._offer(node)
            node = above
        node.refs -= 1
        self._drop_root(node)

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
            self.num_nodes -= 1
            if each.snapshot:
                self.drop_snapshot(each)
            if each.refs == 0:
                self.num_evictable -= 1
                self._free(each)

    def evict_block(self) -> None:
        """Evict the end of the branch that was used least recently. Raises CacheAccountingError if all is held."""
        while self._leaves:
            stamp, _, node = heappop(self._leaves)
            if not (node.gone or node.refs or node.children) and node.stamp == stamp:
                above = self._remove(node)
                if above is not None:
                    self._offer(above)
                return
        raise CacheAccountingError("no node can be evicted")

    # Snapshots

    @property
    def needs_snapshots(self) -> bool:
        """Whether a prefix can be used only where there is a snapshot."""
        return self._snapshots is not None

    @property
    def num_saved(self) -> int:
        """Nodes that have a snapshot."""
        return len(self._passed) + len(self._minor) + len(self._major)

    def saved(self) -> Iterator[Node]:
        """Nodes that have a snapshot, in the order in which they would lose it."""
        return chain(self._passed, self._minor, self._major)

    def take_snapshot(self, node: Node, minor: bool = False) -> int:
        """A snapshot to fill on behalf of the path to `node`; 0 if there is none to be had.

        A path that has its share gives up its own least recently used one, else the tree does, though not a major one
        for a `minor`.
        """
        assert self._snapshots is not None
        path = _saved_above(node)
        if len(path) >= max(2, self._snapshots.num_snapshots // PATH_SHARE):
            own = set(path)
            self.drop_snapshot(next(each for each in self.saved() if each in own))
        elif not self._snapshots.num_free:
            if not self.num_saved or (minor and not self._passed and not self._minor):
                return 0
            self.drop_snapshot(next(self.saved()))
        return self._snapshots.allocate()

    def pass_by(self, node: Node) -> None:
        """A prompt goes on to `node`, which gets a snapshot. Those above it where no path has parted, and from which
        one sequence began at most, are likely of no more use: earlier turns of a conversation."""
        for above in _saved_above(node):
            if above.reuses <= 1 and len(above.children) == 1 and above not in self._passed:
                self._leave(above)
                self._passed[above] = None

    def attach(self, node: Node, snapshot: int, ready: int) -> bool:
        """Give `node` a snapshot, which is freed if it has one or is gone."""
        assert self._snapshots is not None
        if node.gone or node.snapshot:
            self._snapshots.free(snapshot)
            return False
        node.snapshot, node.due, node.reuses = snapshot, ready, 0
        self._major[node] = None
        return True

    def is_minor(self, tail: Node, depth: int) -> bool:
        """Whether a snapshot that decoding leaves `depth` blocks down the path of `tail` is worth less than the one
        above it: less was decoded since that one than was computed for it."""
        depths = [each.depth for each in _saved_above(tail) if each not in self._passed and each.depth < depth]
        return bool(depths) and depth - depths[0] <= depths[0] - (*depths, 0)[1]

    def mark_minor(self, node: Node) -> None:
        """`node`'s snapshot goes before all major ones, until a sequence begins from it."""
        self._leave(node)
        self._minor[node] = None

    def detach_snapshot(self, node: Node) -> int:
        """Take `node`'s snapshot, which becomes the caller's."""
        snapshot, node.snapshot = node.snapshot, 0
        self._leave(node)
        return snapshot

    def drop_snapshot(self, node: Node) -> None:
        """Free `node`'s snapshot; its block stays."""
        assert self._snapshots is not None
        self._snapshots.free(self.detach_snapshot(node))
        node.lost = True
        if not (self._blocks.num_blocks or node.refs or node.gone):
            self._offer(node)

    def use_snapshot(self, node: Node) -> int:
        """The snapshot that a sequence begins from."""
        self._leave(node)
        self._major[node] = None
        node.reuses += 1
        return node.snapshot

    # Inside

    def _leave(self, node: Node) -> None:
        for saved in (self._passed, self._minor, self._major):
            saved.pop(node, None)

    def _offer(self, node: Node) -> None:
        """`node`, which nobody holds, may be evicted if nothing is below it; at once if it is of no use, and then what
        is above it likewise."""
        while not (node.children or self._blocks.num_blocks or node.snapshot):
            above = self._remove(node)
            if above is None:
                return
            node = above
        if node.children:
            return
        self._pushed += 1
        heappush(self._leaves, (node.stamp, self._pushed, node))
        if len(self._leaves) > 64 + 2 * self.num_nodes:
            self._leaves = [e for e in self._leaves if not (e[2].gone or e[2].refs) and e[2].stamp == e[0]]
            heapify(self._leaves)

    def _remove(self, node: Node) -> Node | None:
        """Take a leaf that nobody holds out of the tree: what is above it, if nobody holds that either."""
        parent = node.parent
        assert parent is not None
        self._detach(node)
        node.gone = True
        self.num_nodes -= 1
        self.num_evictable -= 1
        if node.snapshot:
            self.drop_snapshot(node)
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


def _saved_above(node: Node) -> list[Node]:
    """`node` and those above it that have a snapshot, from the last."""
    found = []
    each: Node | None = node
    while each is not None:
        if each.snapshot:
            found.append(each)
        each = each.parent
    return found
