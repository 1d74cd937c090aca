"""State slots: a running sequence has one, whether or not its model keeps state in it."""

from __future__ import annotations

from thalweg.cache.blocks import Pool


class SlotPool(Pool):
    """Slots numbered 1 to num_slots. The slot freed last goes out first, so few sequences touch few slots."""

    kind = "slot"

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.num_slots = num_slots

    def allocate(self) -> int:
        """A free slot, which becomes the caller's. Raises CacheAccountingError when there is none."""
        return self._take(1)[0]

    def free(self, slot: int) -> None:
        """Gives a slot back. Raises CacheAccountingError at one that is not taken, or not of this pool."""
        self._give_back((slot,))
