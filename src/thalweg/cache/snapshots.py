"""Snapshots: copies of every state of a sequence at one position, in a pool of their own."""

from __future__ import annotations

from thalweg.cache.blocks import Pool


class SnapshotPool(Pool):
    """Snapshots numbered 1 to num_snapshots."""

    kind = "snapshot"

    def __init__(self, num_snapshots: int) -> None:
        super().__init__(num_snapshots)
        self.num_snapshots = num_snapshots

    def allocate(self) -> int:
        """A free snapshot, which becomes the caller's. Raises CacheAccountingError when there is none."""
        return self._take(1)[0]

    def free(self, snapshot: int) -> None:
        """Gives a snapshot back. Raises CacheAccountingError at one that is not taken, or not of this pool."""
        self._give_back((snapshot,))
