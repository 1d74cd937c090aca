"""Which rank has which routed expert, in integers: as ranks divide them evenly, or as a file says, with copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thalweg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """`slots[rank]` are the experts of one layer that a data-parallel rank has, as many on each. An expert that is on
    several ranks has a copy on each of them."""

    slots: tuple[tuple[int, ...], ...]

    @staticmethod
    def even(experts: int, ranks: int) -> Placement:
        """Experts in order, none twice. Raises ConfigError if the ranks do not divide them."""
        if experts % ranks:
            raise ConfigError(
                f"--data-parallel-size is {ranks}; it must divide the number of experts, which is {experts}"
            )
        here = experts // ranks
        return Placement(tuple(tuple(range(rank * here, (rank + 1) * here)) for rank in range(ranks)))

    @staticmethod
    def of_row(row: Sequence[int], experts: int, ranks: int, where: str) -> Placement:
        """The experts of all slots, those of rank 0 first. Raises ConfigError, which begins with `where`, unless each
        expert is there, at most once per rank."""
        here = len(row) // ranks
        if not here or len(row) % ranks:
            raise ConfigError(f"{where} has {len(row)} slots; expected a multiple of --data-parallel-size {ranks}")
        if set(row) != set(range(experts)):
            odd = sorted(set(row) ^ set(range(experts)))[:5]
            raise ConfigError(f"{where} should have every expert from 0 to {experts - 1}, and no other; see {odd}")
        slots = tuple(tuple(row[rank * here : (rank + 1) * here]) for rank in range(ranks))
        for rank, own in enumerate(slots):
            if len(set(own)) < len(own):
                raise ConfigError(f"{where} gives rank {rank} an expert twice; expected copies on different ranks")
        return Placement(slots)

    @property
    def here(self) -> int:
        """Slots on each rank."""
        return len(self.slots[0])

    @property
    def row(self) -> list[int]:
        return [expert for own in self.slots for expert in own]

    def choices(self, rank: int) -> list[list[int]]:
        """For each expert the numbers of the slots, counted over all ranks, that tokens of `rank` go to: its own, if it
        has the expert."""
        found: list[list[int]] = [[] for _ in range(max(self.row) + 1)]
        for number, expert in enumerate(self.row):
            found[expert].append(number)
        own = range(rank * self.here, (rank + 1) * self.here)
        return [[n for n in numbers if n in own] or numbers for numbers in found]


def place(tokens: Sequence[int], redundant: int, ranks: int) -> Placement:
    """A placement of a layer's experts and `redundant` copies over `ranks`, even in the `tokens` that experts got: the
    experts with the most tokens per copy get the copies. Raises ConfigError if the ranks do not divide the slots, or
    there are more copies than ranks have use for."""
    experts, slots = len(tokens), len(tokens) + redundant
    if slots % ranks:
        raise ConfigError(f"{experts} experts and {redundant} copies are {slots}; expected a multiple of {ranks} ranks")
    if redundant > (most := experts * (ranks - 1)):
        raise ConfigError(f"--redundant is {redundant}; expected at most {most}, which puts every expert on every rank")
    copies = [1] * experts
    for _ in range(redundant):
        copies[max((e for e in range(experts) if copies[e] < ranks), key=lambda e: (tokens[e] / copies[e], -e))] += 1
    free, loads = [slots // ranks] * ranks, [0.0] * ranks
    placed: list[list[int]] = [[] for _ in range(ranks)]

    def put(expert: int, chosen: Sequence[int]) -> None:
        for rank in chosen:
            placed[rank].append(expert)
            free[rank] -= 1
            loads[rank] += tokens[expert] / copies[expert]

    # Those with copies go first, to the ranks with the most room: later there might not be enough different ranks.
    by_load = sorted(range(experts), key=lambda e: (-tokens[e] / copies[e], e))
    for expert in sorted((e for e in by_load if copies[e] > 1), key=lambda e: -copies[e]):
        put(expert, sorted(range(ranks), key=lambda r: (-free[r], loads[r], r))[: copies[expert]])
    for expert in (e for e in by_load if copies[e] == 1):
        put(expert, [min((r for r in range(ranks) if free[r]), key=lambda r: (loads[r], r))])
    return Placement(tuple(tuple(sorted(own)) for own in placed))
