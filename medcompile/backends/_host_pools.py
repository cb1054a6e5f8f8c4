"""A decoder's pools of keys and values as arrays of this process: what every CPU backend does with them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

POOLS = ("k_pool.", "v_pool.")
"""How the names of inputs that are pools begin."""


class HostPools:
    """Pools [blocks, ...], one array for each, into which the graph writes."""

    def __init__(self) -> None:
        self._pools: list[Array] = []

    @property
    def pool_bytes(self) -> int:
        """Of all blocks of all layers."""
        return sum(pool.nbytes for pool in self._pools)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, source to destination, in every layer. Pairs are copied in order."""
        for source, destination in pairs:
            for pool in self._pools:
                pool[destination] = pool[source]
