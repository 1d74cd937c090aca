"""Which nodes of a prefix tree have a snapshot, which get one, and which lose theirs for it."""

from __future__ import annotations

from thalweg.cache.node import Node
from thalweg.cache.snapshots import SnapshotOrder, SnapshotPool


class SavingTree:
    """The part of the prefix tree that has to do with snapshots. `snapshots` None: the model keeps no state."""

    keeps_displaced = False  # whether snapshots that make room for others are kept elsewhere

    def __init__(self, snapshots: SnapshotPool | None) -> None:
        self._snapshots = snapshots
        self.saved = SnapshotOrder()  # nodes with a snapshot
        self.step = 0  # the plan that is being made

    @property
    def needs_snapshots(self) -> bool:
        """Whether a prefix can be used only where there is a snapshot."""
        return self._snapshots is not None

    def take_snapshot(self, node: Node, minor: bool = False) -> int:
        """A snapshot to fill on behalf of the path to `node`; 0 if there is none to be had.

        A path that has its share gives up its own least recently used one, else the tree does, though not a major one
        for a `minor`.
        """
        assert self._snapshots is not None
        path = _saved_above(node)
        if len(path) >= self._snapshots.most_per_path:
            self.drop_snapshot(self.saved.first_of(path))
        elif not self._snapshots.num_free:
            saved = self.saved
            if not saved or (minor and not (saved.passed or saved.minor or self.keeps_displaced)):
                return 0
            self.drop_snapshot(next(iter(saved)))
        return self._snapshots.allocate()

    def pass_by(self, node: Node) -> None:
        """A prompt goes on to `node`, which gets a snapshot. Those above it where no path has parted, and from which
        one sequence began at most, are likely of no more use: earlier turns of a conversation."""
        for above in _saved_above(node):
            if above.reuses <= 1 and len(above.children) == 1 and above not in self.saved.passed:
                self.saved.move(above, self.saved.passed)

    def attach(self, node: Node, snapshot: int, ready: int) -> bool:
        """Give `node` a snapshot, which is freed if it has one or is gone."""
        assert self._snapshots is not None
        if node.gone or node.snapshot:
            self._snapshots.free(snapshot)
            return False
        node.snapshot, node.due, node.written, node.reuses = snapshot, ready, self.step, 0
        self.saved.move(node, self.saved.major)
        return True

    def is_minor(self, tail: Node, depth: int) -> bool:
        """Whether a snapshot that decoding leaves `depth` blocks down the path of `tail` is worth less than the one
        above it: less was decoded since that one than was computed for it."""
        depths = [each.depth for each in _saved_above(tail) if each not in self.saved.passed and each.depth < depth]
        return bool(depths) and depth - depths[0] <= depths[0] - (*depths, 0)[1]

    def mark_minor(self, node: Node) -> None:
        """`node`'s snapshot goes before all major ones, until a sequence begins from it."""
        self.saved.move(node, self.saved.minor)

    def detach_snapshot(self, node: Node) -> int:
        """Take `node`'s snapshot, which becomes the caller's."""
        snapshot, node.snapshot = node.snapshot, 0
        self.saved.remove(node)
        return snapshot

    def drop_snapshot(self, node: Node) -> None:
        """Free `node`'s snapshot for another; its block stays."""
        self._save(node)
        self.forget_snapshot(node)
        node.lost = True

    def forget_snapshot(self, node: Node) -> None:
        """Free `node`'s snapshot, if it has one, which is not to be used again."""
        if not node.snapshot:
            return
        assert self._snapshots is not None
        self._snapshots.free(self.detach_snapshot(node))
        self._lost_snapshot(node)

    def forget_states(self, node: Node) -> None:
        """Nobody is to continue from `node` as it was computed."""
        self.forget_snapshot(node)

    def use_snapshot(self, node: Node) -> int:
        """The snapshot that a sequence begins from."""
        self.saved.move(node, self.saved.major)
        node.reuses += 1
        return node.snapshot

    def _save(self, node: Node) -> None:
        """`node` is about to lose its snapshot."""

    def _lost_snapshot(self, node: Node) -> None:
        """`node` has none any more."""


def _saved_above(node: Node) -> list[Node]:
    """`node` and those above it that have a snapshot, from the last."""
    found = []
    each: Node | None = node
    while each is not None:
        if each.snapshot:
            found.append(each)
        each = each.parent
    return found
