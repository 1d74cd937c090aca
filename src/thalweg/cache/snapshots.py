"""Snapshots: copies of every state of a sequence at one position, in a pool of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import chain

from thalweg.cache.blocks import Pool
from thalweg.cache.node import Node

PATH_SHARE = 4  # one path, from the root to a node, has at most a quarter of the snapshots (2 at least)


class SnapshotPool(Pool):
    """Snapshots numbered 1 to num_snapshots."""

    kind = "snapshot"

    def __init__(self, num_snapshots: int) -> None:
        super().__init__(num_snapshots)
        self.num_snapshots = num_snapshots

    @property
    def most_per_path(self) -> int:
        """Snapshots that one path may have."""
        return max(2, self.num_snapshots // PATH_SHARE)

    def allocate(self) -> int:
        """A free snapshot, which becomes the caller's. Raises CacheAccountingError when there is none."""
        return self._take(1)[0]

    def free(self, snapshot: int) -> None:
        """Gives a snapshot back. Raises CacheAccountingError at one that is not taken, or not of this pool."""
        self._give_back((snapshot,))


class SnapshotOrder:
    """Nodes that have a snapshot, in the order in which they are given up: those that paths went past, those that are
    little more than the one above them, all others, those that are pinned; the least recently used first."""

    def __init__(self) -> None:
        self.passed: OrderedDict[Node, None] = OrderedDict()
        self.minor: OrderedDict[Node, None] = OrderedDict()
        self.major: OrderedDict[Node, None] = OrderedDict()
        self.pinned: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._classes()))

    def __iter__(self) -> Iterator[Node]:
        return chain(*self._classes())

    def move(self, node: Node, to: OrderedDict[Node, None]) -> None:
        """`node` is in class `to`, unless it is pinned, used just now."""
        self.remove(node)
        (self.pinned if node.pins else to)[node] = None

    def remove(self, node: Node) -> None:
        for nodes in self._classes():
            nodes.pop(node, None)

    def first_of(self, path: Collection[Node]) -> Node:
        """The one of `path` to be given up first."""
        own = set(path)
        return next(each for each in self if each in own)

    def _classes(self) -> tuple[OrderedDict[Node, None], ...]:
        return self.passed, self.minor, self.major, self.pinned
