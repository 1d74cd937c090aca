"""Blocks, slots, and who holds them."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.cache.blocks import BlockPool, CacheAccountingError
from thalweg.cache.manager import CacheManager
from thalweg.cache.slots import SlotPool


def test_blocks_are_numbered_from_1() -> None:
    pool = BlockPool(4)
    assert pool.allocate(0) == []
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.num_free == 1
    pool.free([2, 1])
    assert pool.taken() == [3]
    assert pool.allocate(3) == [1, 2, 4]


def test_slots_freed_last_go_out_first() -> None:
    pool = SlotPool(3)
    assert [pool.allocate(), pool.allocate()] == [1, 2]
    pool.free(1)
    assert [pool.allocate(), pool.allocate()] == [1, 3]
    with pytest.raises(CacheAccountingError, match="1 slots were asked for; 0 are free"):
        pool.allocate()


@pytest.mark.parametrize("block", [0, -1, 5, 2, 3])
def test_freeing_what_is_not_taken_is_a_bug(block: int) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    pool.free([2])
    with pytest.raises(CacheAccountingError, match=f"block {block} was freed"):
        pool.free([block])


@pytest.mark.parametrize("n", [-1, 5])
def test_taking_too_many_is_a_bug(n: int) -> None:
    pool = BlockPool(4)
    with pytest.raises(CacheAccountingError, match="4 are free"):
        pool.allocate(n)
    assert pool.num_free == 4


def test_freeing_a_block_twice_in_one_list_is_a_bug() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(CacheAccountingError, match="twice"):
        pool.free([1, 1])


def test_admit_grow_release() -> None:
    cache = CacheManager(num_blocks=5, num_slots=2, block_size=4)
    assert cache.max_tokens == 20
    assert cache.admit("a", 5) == (1, [1, 2])
    assert cache.admit("b", 4) == (2, [3])
    assert cache.grow("a", 8) == []
    assert cache.grow("a", 9) == [4]
    assert cache.grow("b", 13) is None
    assert cache.grow("b", 8) == [5]
    assert cache.grow("a", 13) is None
    cache.release("a")
    assert cache.grow("b", 20) is not None
    cache.release("b")
    cache.check_idle()
    assert (cache.blocks.num_free, cache.slots.num_free) == (5, 2)


def test_can_admit() -> None:
    cache = CacheManager(num_blocks=3, num_slots=1, block_size=4)
    assert cache.can_admit(12)
    assert not cache.can_admit(13)
    assert cache.can_admit(8, reserve=1)
    assert not cache.can_admit(8, reserve=2)
    cache.admit("a", 1)
    assert not cache.can_admit(1)  # no slot


def test_without_paged_layers_only_slots_count() -> None:
    cache = CacheManager(num_blocks=0, num_slots=1, block_size=64)
    assert cache.max_tokens == cache.tokens_in(0) == sys.maxsize
    assert cache.can_admit(10**9, reserve=0)
    assert cache.admit("a", 10**9) == (1, [])
    assert cache.grow("a", 10**10) == []
    with pytest.raises(CacheAccountingError, match=r"blocks \[\], slots \[1\], held by sequences \['a'\]"):
        cache.check_idle()
    cache.release("a")
    cache.check_idle()


def test_misuse_is_a_bug() -> None:
    cache = CacheManager(num_blocks=3, num_slots=2, block_size=4)
    cache.admit("a", 4)
    with pytest.raises(CacheAccountingError, match="admitted twice"):
        cache.admit("a", 4)
    with pytest.raises(CacheAccountingError, match="1 slots and 2 blocks are free"):
        cache.admit("b", 9)
    for act in (cache.release, lambda seq: cache.grow(seq, 1)):
        with pytest.raises(CacheAccountingError, match="never admitted"):
            act("b")
    with pytest.raises(CacheAccountingError):
        CacheManager(num_blocks=3, num_slots=0, block_size=4)
    with pytest.raises(CacheAccountingError):
        CacheManager(num_blocks=-1, num_slots=1, block_size=4)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 5), st.data())
def test_every_block_has_one_owner(num_blocks: int, num_slots: int, block_size: int, data: st.DataObject) -> None:
    cache = CacheManager(num_blocks, num_slots, block_size)
    tables: dict[str, list[int]] = {}
    slots: dict[str, int] = {}
    for seq in data.draw(st.lists(st.sampled_from("abcdef"), max_size=40)):
        if seq not in tables:
            num_tokens = data.draw(st.integers(1, 20))
            if cache.can_admit(num_tokens):
                slots[seq], tables[seq] = cache.admit(seq, num_tokens)
        elif data.draw(st.booleans()):
            num_tokens = data.draw(st.integers(1, 30))
            new = cache.grow(seq, num_tokens)
            if new is None:
                assert -(-num_tokens // block_size) - len(tables[seq]) > cache.blocks.num_free
            else:
                tables[seq] += new
                assert len(tables[seq]) * block_size >= num_tokens
        else:
            cache.release(seq)
            del tables[seq], slots[seq]
        held = sorted(block for table in tables.values() for block in table)
        assert held == cache.blocks.taken()
        assert sorted(slots.values()) == cache.slots.taken()
        assert cache.blocks.num_free == num_blocks - len(held)
