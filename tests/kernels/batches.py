"""Ragged batches for paged attention, drawn from a seed: every test of a lowering gives it the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Batch:
    """The operator's inputs. history: each sequence's keys and values so far, [past, kv_heads, head_dim]."""

    q: Array
    k: Array
    v: Array
    k_pool: Array
    v_pool: Array
    query_starts: Array
    past_lens: Array
    block_table: Array
    history: list[tuple[Array, Array]]

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (
            self.q,
            self.k,
            self.v,
            self.k_pool.copy(),
            self.v_pool.copy(),
            self.query_starts,
            self.past_lens,
            self.block_table,
        )


def draw(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: Any = np.float32,
    seed: int = 0,
) -> Batch:
    """lengths: (past, new) tokens of each sequence. Blocks lie in no order, and what no token fills holds NaN."""
    rng = np.random.default_rng(seed)
    needed = [-(-(past + new) // block_size) for past, new in lengths]
    blocks = sum(needed) + 2
    order = iter(rng.permutation(np.arange(1, blocks)))  # block 0, where unused entries point, is nobody's
    table = np.zeros((len(lengths), max(1, *needed) + 1), np.int32)
    pools = [np.full((blocks, kv_heads, block_size, head_dim), np.nan, dtype) for _ in "kv"]
    history = []
    for i, (past, _) in enumerate(lengths):
        table[i, : needed[i]] = [next(order) for _ in range(needed[i])]
        old = [rng.standard_normal((past, kv_heads, head_dim)).astype(dtype) for _ in "kv"]
        for pool, values in zip(pools, old, strict=True):
            for at, value in enumerate(values):
                pool[table[i, at // block_size], :, at % block_size] = value
        history.append((old[0], old[1]))
    starts = np.cumsum([0, *(new for _, new in lengths)]).astype(np.int32)
    q, k, v = (rng.standard_normal((starts[-1], n * head_dim)).astype(dtype) for n in (heads, kv_heads, kv_heads))
    past_lens = np.array([past for past, _ in lengths], np.int32)
    return Batch(q, k, v, pools[0], pools[1], starts, past_lens, table, history)
