"""Places in host memory, and the copies from and to them that the next plan asks for."""

from __future__ import annotations

from thalweg.cache.blocks import BlockPool
from thalweg.cache.snapshots import SnapshotPool
from thalweg.core import HostCopies


class HostPools:
    """Places for blocks and for snapshots in host memory, and the copies from and to them that the next plan asks for.
    Only the last copy into a place counts."""

    def __init__(self, num_blocks: int, num_snapshots: int) -> None:
        self.blocks, self.snapshots = BlockPool(num_blocks), SnapshotPool(num_snapshots)
        self.saves: tuple[dict[int, int], dict[int, int]] = {}, {}  # by place: block, snapshot
        self.fetches: tuple[dict[int, int], dict[int, int]] = {}, {}  # by block, by snapshot: place
        self.num_saved = [0, 0]  # blocks and snapshots since start
        self.num_fetched = [0, 0]

    def free_block(self, place: int) -> None:
        self.blocks.free((place,))
        self.saves[0].pop(place, None)

    def free_snapshot(self, place: int) -> None:
        self.snapshots.free(place)
        self.saves[1].pop(place, None)

    def counts(self) -> dict[str, int]:
        """Copies since start."""
        names = ("blocks_saved", "snapshots_saved", "blocks_fetched", "snapshots_fetched")
        return dict(zip(names, (*self.num_saved, *self.num_fetched), strict=True))

    def take(self) -> HostCopies | None:
        """The copies so far, for the plan that is now complete."""
        if not any((*self.saves, *self.fetches)):
            return None
        saves = [[(source, place) for place, source in kind.items()] for kind in self.saves]
        fetches = [[(place, target) for target, place in kind.items()] for kind in self.fetches]
        for i in range(2):
            self.num_saved[i] += len(saves[i])
            self.num_fetched[i] += len(fetches[i])
        for kind in (*self.saves, *self.fetches):
            kind.clear()
        return HostCopies(*saves, *fetches)
