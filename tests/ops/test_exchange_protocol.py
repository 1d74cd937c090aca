"""The order in which ranks write and read each other's places (ops/toolchain/ranks.cuh), in every interleaving.

A model of it: a rank runs kernels one after another, a kernel's blocks in any order beside one another, and a block
writes its words to every other rank, then polls for theirs. A word comes with the number of its exchange, so a value
can only be missed, by being overwritten before it was read: then its reader polls for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

WORDS = 2
Place = Callable[[int, int], int]  # of (block, kernel): where the block's words lie


class Block(NamedTuple):
    written: int = 0  # words, to each of the other ranks
    read: int = 0  # words, of all other ranks


class Rank(NamedTuple):
    kernel: int  # that runs
    blocks: tuple[Block, ...]  # of that kernel
    counts: tuple[int, ...]  # of exchanges that blocks of each number have ended


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    memory: frozenset[tuple[tuple[int, ...], int]]  # (reader, kind, writer, address) -> number, as pairs


def stuck(grids: list[int], ranks: int, kinds: int, place: Place = lambda block, _: block) -> State | None:
    """A state that can be reached and in which some rank waits for ever; None: there is none. `grids` are the numbers
    of blocks of the kernels, `kinds` the kinds of places that exchanges take in turn."""
    most = max(grids)
    start = State(tuple(Rank(0, (Block(),) * grids[0], (0,) * most) for _ in range(ranks)), frozenset())
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        following = list(_following(state, grids, kinds, place))
        if not following and any(rank.kernel < len(grids) for rank in state.ranks):
            return state
        for after in following:
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return None


def _following(state: State, grids: list[int], kinds: int, place: Place) -> Iterator[State]:
    memory = dict(state.memory)
    for r, rank in enumerate(state.ranks):
        if rank.kernel == len(grids):
            continue
        others = [o for o in range(len(state.ranks)) if o != r]
        for b, block in enumerate(rank.blocks):
            number = rank.counts[b] + 1
            kind, first = number % kinds, place(b, rank.kernel) * WORDS
            if block.written < WORDS:
                more = {(o, kind, r, first + block.written): number for o in others}
                changed = _replaced(rank.blocks, b, block._replace(written=block.written + 1))
                after = rank._replace(blocks=changed)
                yield State(_replaced(state.ranks, r, after), frozenset((memory | more).items()))
            elif block.read < WORDS and all(memory.get((r, kind, o, first + block.read)) == number for o in others):
                changed = _replaced(rank.blocks, b, block._replace(read=block.read + 1))
                after = _next_kernel(rank._replace(blocks=changed), grids)
                yield State(_replaced(state.ranks, r, after), state.memory)


def _next_kernel(rank: Rank, grids: list[int]) -> Rank:
    """The kernel behind starts once all blocks of this one have ended."""
    if any(block.read < WORDS for block in rank.blocks):
        return rank
    counts = tuple(n + (b < len(rank.blocks)) for b, n in enumerate(rank.counts))
    after = rank.kernel + 1
    return Rank(after, (Block(),) * (grids[after] if after < len(grids) else 0), counts)


def _replaced(values: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*values[:index], value, *values[index + 1 :])


@pytest.mark.parametrize(
    ("grids", "ranks"), [([1, 1, 1, 1, 1], 2), ([2, 1, 2, 2], 2), ([1, 2, 1, 1, 2], 2), ([1, 1, 1], 3)]
)
def test_nothing_is_overwritten_before_it_is_read(grids: list[int], ranks: int) -> None:
    assert stuck(grids, ranks, kinds=2) is None


def test_with_places_of_one_kind_a_rank_that_is_ahead_overwrites() -> None:
    assert stuck([1, 1], ranks=2, kinds=1) is not None


def test_places_that_other_blocks_had_before_may_still_be_read() -> None:
    """As if a place lay where a launch's size puts it, while blocks' counts differ after the first kernel."""
    assert (
        stuck([1, 2, 2], ranks=2, kinds=2, place=lambda block, kernel: block if kernel < 2 else 1 - block) is not None
    )


class Thread(NamedTuple):
    written: int = 0  # elements, to the other rank
    read: int = 0  # elements of the other's, and zeros left in their places
    cleared: int = 0


def misread(parts: list[list[list[int]]], kinds: int) -> bool:
    """The same of two ranks whose data are their own flags (ops/all_reduce/many.cu): whatever is not zero counts as
    come, and a place is left with zeros. Whether anybody can read what is of another exchange, or wait for ever.
    `parts` are the elements of each thread of each kernel, which lie where their number says."""
    start = (tuple((0, (Thread(),) * len(parts[0])) for _ in range(2)), frozenset())
    seen, waiting = {start}, [start]
    while waiting:
        ranks, memory = waiting.pop()
        following = []
        for r, (kernel, threads) in enumerate(ranks):
            if kernel == len(parts):
                continue
            number, held = kernel + 1, dict(memory)
            for t, thread in enumerate(threads):
                elements = parts[kernel][t]
                if thread.written < len(elements):
                    held_after = held | {(1 - r, number % kinds, elements[thread.written]): number}
                    after = thread._replace(written=thread.written + 1)
                elif thread.cleared < thread.read:
                    held_after = {k: v for k, v in held.items() if k != (r, number % kinds, elements[thread.cleared])}
                    after = thread._replace(cleared=thread.cleared + 1)
                elif thread.read < len(elements) and (r, number % kinds, elements[thread.read]) in held:
                    if held[r, number % kinds, elements[thread.read]] != number:
                        return True
                    held_after, after = held, thread._replace(read=thread.read + 1)
                else:
                    continue
                all_threads = _replaced(threads, t, after)
                if all(x.cleared == len(e) for x, e in zip(all_threads, parts[kernel], strict=True)):
                    kernel_after = kernel + 1
                    rank = (kernel_after, (Thread(),) * (len(parts[kernel_after]) if kernel_after < len(parts) else 0))
                else:
                    rank = (kernel, all_threads)
                following.append((_replaced(ranks, r, rank), frozenset(held_after.items())))
        if not following and any(kernel < len(parts) for kernel, _ in ranks):
            return True
        for each in following:
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return False


@pytest.mark.parametrize("parts", [[[[0], [1]]] * 3, [[[0], [1]], [[1], [0]], [[0, 1]]], [[[0, 1]], [[1]], [[0], [1]]]])
def test_data_that_are_their_own_flags_are_read_once_each(parts: list[list[list[int]]]) -> None:
    assert not misread(parts, kinds=2)


def test_data_that_are_their_own_flags_need_places_of_two_kinds() -> None:
    assert misread([[[0]], [[0]]], kinds=1)
