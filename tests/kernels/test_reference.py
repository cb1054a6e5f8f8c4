"""The numpy reference, held to a softmax over each sequence's whole history that knows nothing of blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.kernels.reference import paged_attention
from tests.kernels import decoders
from tests.kernels.batches import Array, Batch, draw

RAGGED = [(0, 7), (16, 1), (3, 0), (31, 18), (40, 1)]


def dense(batch: Batch, heads: int, kv_heads: int, head_dim: int, scale: float, window: int = 0) -> Array:
    """Token by token and head by head, over contiguous keys and values."""
    out = np.zeros(batch.q.shape)
    for i, (old_k, old_v) in enumerate(batch.history):
        start, end = batch.query_starts[i : i + 2]
        keys = np.concatenate([old_k, batch.k[start:end].reshape(-1, kv_heads, head_dim)]).astype(np.float64)
        values = np.concatenate([old_v, batch.v[start:end].reshape(-1, kv_heads, head_dim)]).astype(np.float64)
        for token in range(start, end):
            last = len(old_k) + token - start + 1
            first = max(0, last - window) if window else 0
            for head in range(heads):
                kv = head // (heads // kv_heads)
                part = slice(head * head_dim, (head + 1) * head_dim)
                scores = keys[first:last, kv] @ batch.q[token, part].astype(np.float64) * scale
                weights = np.exp(scores - scores.max())
                out[token, part] = weights / weights.sum() @ values[first:last, kv]
    return out


@pytest.mark.parametrize("window", [0, 1, 5, 16, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_ragged_batch_of_prefill_chunks_and_decode_steps_equals_a_dense_softmax(kv_heads: int, window: int) -> None:
    face = {"heads": 4, "kv_heads": kv_heads, "head_dim": 8, "scale": 0.3}
    batch = draw(RAGGED, heads=4, kv_heads=kv_heads, head_dim=8, block_size=16)
    found = paged_attention(*batch.arrays, **face, sliding_window=window)
    np.testing.assert_allclose(found, dense(batch, **face, window=window), atol=1e-6)
    assert found.dtype == np.float32


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 4, 16, 32]),
    window=st.integers(0, 50),
    seed=st.integers(0, 9),
)
def test_any_ragged_batch_equals_a_dense_softmax(
    lengths: list[tuple[int, int]], block_size: int, window: int, seed: int
) -> None:
    face = {"heads": 2, "kv_heads": 1, "head_dim": 4, "scale": 0.5}
    batch = draw(lengths, heads=2, kv_heads=1, head_dim=4, block_size=block_size, seed=seed)
    found = paged_attention(*batch.arrays, **face, sliding_window=window)
    np.testing.assert_allclose(found, dense(batch, **face, window=window), atol=1e-6)


def test_only_the_slots_of_the_new_tokens_change_in_the_pools() -> None:
    batch = draw(RAGGED, heads=2, kv_heads=2, head_dim=4, block_size=16)
    arrays = batch.arrays
    paged_attention(*arrays, heads=2, kv_heads=2, head_dim=4, scale=1.0)
    expected = [batch.k_pool.copy(), batch.v_pool.copy()]
    for i, (past, new) in enumerate(RAGGED):
        for offset in range(new):
            row, at = batch.query_starts[i] + offset, past + offset
            for pool, fresh in zip(expected, (batch.k, batch.v), strict=True):
                pool[batch.block_table[i, at // 16], :, at % 16] = fresh[row].reshape(2, 4)
    for found, wanted in zip(arrays[3:5], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_chunks_of_a_prompt_give_what_the_whole_prompt_gives() -> None:
    face = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 0.35}
    whole = draw([(0, 45)], heads=4, kv_heads=2, head_dim=8, block_size=16)
    q, k, v, k_pool, v_pool, _, _, table = whole.arrays
    parts = []
    for start, end in ((0, 20), (20, 21), (21, 45)):
        starts, past = np.array([0, end - start], np.int32), np.array([start], np.int32)
        chunk = (q[start:end], k[start:end], v[start:end])
        parts.append(paged_attention(*chunk, k_pool, v_pool, starts, past, table, **face))
    np.testing.assert_allclose(np.concatenate(parts), paged_attention(*whole.arrays, **face), atol=1e-6)


def test_a_sliding_window_reads_no_block_before_it() -> None:
    """A scheduler may give such blocks away: their table entries then point at another sequence's tokens."""
    batch = draw([(60, 2)], heads=2, kv_heads=1, head_dim=4, block_size=16)
    wanted = paged_attention(*batch.arrays, heads=2, kv_heads=1, head_dim=4, scale=1.0, sliding_window=10)
    batch.block_table[0, :3] = 0  # all NaN; 60 - 9 = 51 is the first position in sight
    found = paged_attention(*batch.arrays, heads=2, kv_heads=1, head_dim=4, scale=1.0, sliding_window=10)
    np.testing.assert_array_equal(found, wanted)


def test_keys_and_values_are_rounded_to_the_dtype_of_the_pools() -> None:
    batch = draw([(0, 3)], heads=1, kv_heads=1, head_dim=4, block_size=16)
    k_pool, v_pool = (np.zeros((2, 1, 16, 4), np.float16) for _ in "kv")
    table = np.array([[1]], np.int32)
    rest = (batch.query_starts, batch.past_lens, table)
    face = {"heads": 1, "kv_heads": 1, "head_dim": 4, "scale": 1.0}
    found = paged_attention(batch.q, batch.k, batch.v, k_pool, v_pool, *rest, **face)
    np.testing.assert_array_equal(v_pool[1, 0, :3], batch.v.astype(np.float16))
    np.testing.assert_array_equal(found[0], batch.v[0].astype(np.float16).astype(np.float32))


def test_a_whole_decoder_gives_the_same_logits_in_chunks_as_at_once(tmp_path: Path) -> None:
    """The graph that engines are built from, through onnx's reference with this operator in it."""
    decoders.write(tmp_path / "generate.onnx", dtype="FLOAT")
    whole = decoders.feeds([0], [30])
    whole |= {name: np.zeros(array.shape, np.float32) for name, array in whole.items() if "pool" in name}
    chunks = {name: array.copy() for name, array in whole.items()}
    wanted = decoders.answer(tmp_path / "generate.onnx", whole)
    ids = chunks["input_ids"]
    for start, end in ((0, 13), (13, 30)):
        chunks |= {
            "input_ids": ids[start:end],
            "past_lens": np.array([start], np.int32),
            "query_starts": np.array([0, end - start], np.int32),
            "logit_rows": np.array([end - start - 1]),
        }
        found = decoders.answer(tmp_path / "generate.onnx", chunks)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(chunks["k_pool.1"], whole["k_pool.1"], atol=1e-6)
    assert np.abs(wanted).max() > 0.1
