"""Paged attention in numpy: what `medcompile::PagedAttention` means, and the oracle of every lowering of it.

Batches are ragged: the new tokens of all sequences lie end to end, none is padded. Exact rather than fast: arithmetic
is float64, and rounding happens where the operator rounds, into the pools' dtype and into the output's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    k_pool: Array,
    v_pool: Array,
    query_starts: Array,
    past_lens: Array,
    block_table: Array,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    sliding_window: int = 0,
) -> Array:
    """Write the new k and v into the pools, in place; then each token attends to its own sequence up to itself.

    q [tokens, heads * head_dim]; k, v [tokens, kv_heads * head_dim], positions applied; heads a multiple of kv_heads.
    k_pool, v_pool [blocks, kv_heads, block_size, head_dim], of the dtype in which keys and values are kept.
    query_starts [sequences + 1]: sequence i owns the tokens query_starts[i] to query_starts[i + 1], maybe none.
    past_lens [sequences]: its tokens in the pools so far. block_table [sequences, table]: entry j of row i is the
    block that holds its tokens from j * block_size on; only entries that hold a token in sight are read.
    sliding_window: a token sees itself and the sliding_window - 1 before it; 0 is no limit.
    Returns [tokens, heads * head_dim] in q's dtype.
    """
    block_size = k_pool.shape[2]
    sequences = [
        (int(start), int(end), int(past), row)
        for start, end, past, row in zip(query_starts[:-1], query_starts[1:], past_lens, block_table, strict=True)
        if start < end
    ]
    for start, end, past, row in sequences:
        positions = np.arange(past, past + end - start)
        blocks, slots = row[positions // block_size], positions % block_size
        k_pool[blocks, :, slots] = k[start:end].reshape(-1, kv_heads, head_dim)
        v_pool[blocks, :, slots] = v[start:end].reshape(-1, kv_heads, head_dim)
    out = np.empty_like(q)
    for start, end, past, row in sequences:
        length = past + end - start
        first = max(0, past - sliding_window + 1) // block_size if sliding_window else 0
        keys, values = (_gather(pool, row[first : -(-length // block_size)]) for pool in (k_pool, v_pool))
        queries = q[start:end].astype(np.float64).reshape(end - start, kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        key_at = first * block_size + np.arange(keys.shape[1])
        query_at = np.arange(past, length)[:, None]
        seen = key_at <= query_at
        if sliding_window:
            seen &= key_at > query_at - sliding_window
        seen_at_all = seen.any(axis=0)
        seen, keys, values = seen[:, seen_at_all], keys[:, seen_at_all], values[:, seen_at_all]
        scores = queries @ keys[:, None].swapaxes(-1, -2) * scale  # [kv_heads, group, tokens, keys]
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = weights @ values[:, None] / weights.sum(axis=-1, keepdims=True)
        out[start:end] = mixed.transpose(2, 0, 1, 3).reshape(end - start, heads * head_dim)
    return out


def _gather(pool: Array, blocks: Array) -> Array:
    """The tokens of these blocks, [kv_heads, tokens, head_dim] in float64."""
    found = pool[blocks].astype(np.float64).swapaxes(0, 1)  # [kv_heads, blocks, block_size, head_dim]
    return found.reshape(pool.shape[1], -1, pool.shape[3])
