from __future__ import annotations

import numpy as np
import pytest

from medcompile.errors import CacheFull
from medcompile.runtime.kv_cache import BlockPool, block_hashes


def test_block_pool_raises_cache_full_and_takes_nothing_when_too_few_blocks_are_free() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(2)
    with pytest.raises(CacheFull, match="2 blocks wanted, 1 of 3 free"):
        pool.allocate(2)
    assert pool.free == 1


def test_only_full_blocks_have_a_hash_and_it_depends_on_all_tokens_before() -> None:
    tokens = np.arange(11)
    hashes = block_hashes(tokens, 4)
    assert len(hashes) == 2
    changed = tokens.copy()
    changed[0] = 99
    assert block_hashes(changed, 4)[1] != hashes[1]
    changed = tokens.copy()
    changed[5] = 99
    assert block_hashes(changed, 4)[0] == hashes[0]
    assert block_hashes(changed, 4)[1] != hashes[1]


def test_hashes_go_on_from_those_known() -> None:
    tokens = np.arange(12)
    assert block_hashes(tokens, 4, block_hashes(tokens[:6], 4), "salt") != block_hashes(tokens, 4, (), "salt")
    assert block_hashes(tokens, 4, block_hashes(tokens[:6], 4, (), "salt"), "salt") == block_hashes(
        tokens, 4, (), "salt"
    )


def test_sequences_of_different_salts_share_no_hash() -> None:
    assert not set(block_hashes(np.arange(16), 4, (), "a")) & set(block_hashes(np.arange(16), 4, (), "b"))


def test_a_published_block_is_found_after_its_owner_left_until_its_place_is_needed() -> None:
    pool = BlockPool(2, 4)
    hashes = block_hashes(np.arange(8), 4)
    blocks = pool.allocate(2)
    for block, value in zip(blocks, hashes, strict=True):
        pool.publish(block, value)
    pool.release(blocks)
    assert pool.free == 2
    assert pool.find(hashes) == blocks
    pool.allocate(1)  # the last block of the sequence goes first: without it the first one is of use still
    assert pool.find(hashes) == blocks[:1]
    pool.allocate(1)
    assert pool.find(hashes) == []


def test_blank_blocks_are_taken_before_cached_ones_and_cached_ones_in_order_of_last_use() -> None:
    pool = BlockPool(4, 1)
    a, b, c = (pool.allocate(1)[0] for _ in range(3))
    hashes = [bytes([i]) for i in range(3)]
    for block, value in zip((a, b, c), hashes, strict=True):
        pool.publish(block, value)
        pool.release([block])
    pool.share([a])
    pool.release([a])  # used again: now b is the oldest
    blank = pool.allocate(1)[0]
    assert blank not in (a, b, c)
    assert pool.allocate(3) == [b, c, a]


def test_a_shared_block_is_free_when_its_last_owner_leaves() -> None:
    pool = BlockPool(1, 4)
    (block,) = pool.allocate(1)
    pool.publish(block, b"hash")
    pool.share([block])
    pool.release([block])
    assert pool.free == 0
    pool.release([block])
    assert pool.free == 1


def test_equal_content_is_published_once() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2)
    pool.publish(first, b"hash")
    pool.publish(second, b"hash")
    assert pool.find([b"hash"]) == [first]
    assert not pool.published(second)


def test_releasing_what_one_does_not_own_is_a_bug_that_shows() -> None:
    pool = BlockPool(1, 4)
    with pytest.raises(AssertionError):
        pool.release([0])
    with pytest.raises(AssertionError):
        pool.share([0])
