"""Who owns which block of keys and values: reference counts, and full blocks found again by what they hold.

Holds integers only; the pools themselves belong to the StepModel. A block is in one of three states: in use (one
owner or several), cached (nobody's, but its content may be asked for again; the least recently used is taken first)
or blank. A published block is never written to again: who wants to write takes a copy, which scheduler.py arranges.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from medcompile.errors import CacheFull

Array = np.ndarray[Any, Any]


def block_hashes(tokens: Array, block_size: int, known: Sequence[bytes] = (), salt: str = "") -> list[bytes]:
    """The hash of every full block of a sequence, each over its parent's hash and its own tokens.

    Equal hashes mean equal tokens from the sequence's start on, under the same salt: sequences of different salts
    never share. tokens: int64 [n]. known: hashes of the first blocks, if some are known.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else hashlib.blake2b(salt.encode(), digest_size=32).digest()
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashlib.blake2b(parent + tokens[start : start + block_size].tobytes(), digest_size=32).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """The books of a pool of blocks. Not thread-safe: its owner locks."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._owners = [0] * blocks
        self._hash: list[bytes | None] = [None] * blocks
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def free(self) -> int:
        """Blocks that allocate() can give: blank and cached ones."""
        return len(self._blank) + len(self._cached)

    def owners(self, block: int) -> int:
        return self._owners[block]

    def published(self, block: int) -> bool:
        return self._hash[block] is not None

    def allocate(self, count: int) -> list[int]:
        """Blocks of one owner, to be written. Cached content is forgotten only where no blank block is left.

        Raises CacheFull, and takes nothing, where fewer are free.
        """
        if count > self.free:
            raise CacheFull(f"{count} blocks wanted, {self.free} of {self.blocks} free")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            forgotten = self._hash[block]
            assert forgotten is not None
            del self._by_hash[forgotten]
            self._hash[block] = None
        self._owners[block] = 1
        return block

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of leading hashes that are here. Nobody comes to own them by this."""
        found = []
        for value in hashes:
            block = self._by_hash.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """One owner more for each of these blocks, which are published or owned already."""
        for block in blocks:
            assert self._owners[block] or self.published(block), f"block {block} is blank"
            self._cached.pop(block, None)
            self._owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less. A sequence's blocks come in its order: its last one will be the first to be forgotten."""
        for block in reversed(blocks):
            assert self._owners[block] > 0, f"block {block} is released by one who does not own it"
            self._owners[block] -= 1
            if not self._owners[block]:
                if self.published(block):
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def publish(self, block: int, value: bytes) -> None:
        """Let others find this full block, whose keys and values are all computed. If equal ones are, they stay."""
        assert self._owners[block] > 0, f"block {block} has no owner"
        if self._hash[block] is None and value not in self._by_hash:
            self._hash[block] = value
            self._by_hash[value] = block
