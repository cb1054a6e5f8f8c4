"""The Triton kernels as the interpreter runs them, held to the numpy reference. How fast they are is not seen here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from medcompile.kernels import launches
from medcompile.kernels.launches import Face, Float
from medcompile.kernels.reference import paged_attention
from tests.kernels import interpreted
from tests.kernels.batches import Array, draw

pytest.importorskip("triton")

MIXED = [(0, 19), (33, 1), (3, 0), (15, 18), (70, 1)]
STEPS = [(300, 1), (0, 1), (15, 1), (16, 1), (63, 1)]
GUESSES = [(300, 4), (30, 3), (0, 2), (90, 1)]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# A result's last bit, about 4e-6, 2e-3 and 2e-2 near 4, and rounded weights beneath it.
LARGEST_ERROR = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2.5e-2}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.process() as pool:
        yield pool


def check(
    interpreter: ProcessPoolExecutor, face: Face, lengths: list[tuple[int, int]], window: int = 0, seed: int = 0
) -> list[str]:
    """Run a drawn batch both ways and compare output and pools. Returns the kernels that ran."""
    dtype, pool_dtype = DTYPES[face.dtype], DTYPES[face.pool_dtype]
    shape = {"heads": face.heads, "kv_heads": face.kv_heads, "head_dim": face.head_dim}
    batch = draw(lengths, **shape, block_size=face.block_size, dtype=pool_dtype, seed=seed)
    batch.q, batch.k, batch.v = (a.astype(dtype) for a in (batch.q, batch.k, batch.v))
    step = launches.plan(face, len(batch.q), len(lengths), batch.block_table.shape[1])
    scale = face.head_dim**-0.5
    q, k, v, k_pool, v_pool, *rest = batch.arrays
    wanted = paged_attention(
        q.astype(np.float32), k, v, k_pool, v_pool, *rest, **shape, scale=scale, sliding_window=window
    )
    out, *pools = interpreter.submit(interpreted.run, face, step, batch.arrays, scale, window).result()
    np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=0, atol=LARGEST_ERROR[face.dtype])
    for found, pool in zip(pools, (k_pool, v_pool), strict=True):
        np.testing.assert_array_equal(found.view(np.uint8), pool.view(np.uint8))
    return [launch.kernel for launch in step.launches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "kernels"),
    [(MIXED, ["write", "chunks"]), (GUESSES, ["write", "splits", "reduce"]), (STEPS, ["write", "splits", "reduce"])],
    ids=["prefill and decode", "guessed tokens", "decode"],
)
@pytest.mark.parametrize("window", [0, 20])
def test_a_ragged_batch_equals_the_reference(
    interpreter: ProcessPoolExecutor,
    lengths: list[tuple[int, int]],
    kernels: list[str],
    window: int,
    dtype: Float,
) -> None:
    assert check(interpreter, Face(4, 2, 32, 16, dtype, dtype), lengths, window) == kernels


@pytest.mark.parametrize("lengths", [MIXED, STEPS], ids=["prefill and decode", "decode"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(2, 2, 64, 32), (9, 3, 64, 16), (3, 1, 80, 32), (2, 1, 96, 16), (8, 1, 128, 32), (20, 1, 32, 32)],
)
def test_any_shape_of_heads_and_blocks_equals_the_reference(
    interpreter: ProcessPoolExecutor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    lengths: list[tuple[int, int]],
) -> None:
    check(interpreter, Face(heads, kv_heads, head_dim, block_size), lengths)


def test_keys_that_take_smaller_rounds_equal_the_reference(interpreter: ProcessPoolExecutor) -> None:
    check(interpreter, Face(2, 1, 256, 64), MIXED)
    check(interpreter, Face(2, 1, 128, 32, "float32", "float32"), STEPS)


@pytest.mark.parametrize("seed", range(8))
def test_random_ragged_batches_equal_the_reference(interpreter: ProcessPoolExecutor, seed: int) -> None:
    rng = np.random.default_rng(seed)
    longest = int(rng.choice([1, 4, 40]))
    lengths = [(int(rng.integers(0, 200)), int(rng.integers(0, longest + 1))) for _ in range(rng.integers(1, 9))]
    lengths.append((0, 1))  # a batch has at least one token
    face = Face(4, int(rng.choice([1, 2, 4])), 32, int(rng.choice([16, 32])), "float32", "float32")
    check(interpreter, face, lengths, window=int(rng.choice([0, 1, 37])), seed=seed)


def test_enough_short_sequences_need_no_splits(interpreter: ProcessPoolExecutor) -> None:
    face = Face(2, 1, 32, 16, "float32", "float32")
    assert check(interpreter, face, [(20 + i, 1) for i in range(8)]) == ["write", "steps"]


@pytest.mark.parametrize("pool_dtype", ["float16", "bfloat16"])
def test_float32_activations_meet_pools_of_sixteen_bits(interpreter: ProcessPoolExecutor, pool_dtype: Float) -> None:
    """Queries are rounded to the pools' dtype before the products: the error is that dtype's."""
    face = Face(4, 2, 32, 16, "float32", pool_dtype)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32}
    batch = draw(MIXED, **shape, block_size=16, dtype=DTYPES[pool_dtype])
    batch.q, batch.k, batch.v = (a.astype(np.float32) for a in (batch.q, batch.k, batch.v))
    wanted = paged_attention(*batch.arrays, **shape, scale=0.2)
    step = launches.plan(face, len(batch.q), len(MIXED), batch.block_table.shape[1])
    out: Array = interpreter.submit(interpreted.run, face, step, batch.arrays, 0.2, 0).result()[0]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=LARGEST_ERROR[pool_dtype])


def test_tokens_that_belong_to_no_sequence_write_nothing(interpreter: ProcessPoolExecutor) -> None:
    """A batch may be padded to a size for which a CUDA graph is ready."""
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 32}
    batch = draw([(5, 2), (20, 1)], **shape, block_size=16)
    q, k, v, *rest = batch.arrays
    wanted = paged_attention(q, k, v, *rest, **shape, scale=0.2)
    padded = [np.concatenate([a, np.full((3, a.shape[1]), 7, a.dtype)]) for a in (q, k, v)]
    face = Face(2, 1, 32, 16, "float32", "float32")
    step = launches.plan(face, 6, 2, batch.block_table.shape[1])
    run = interpreter.submit(interpreted.run, face, step, (*padded, *batch.arrays[3:]), 0.2, 0)
    out, k_pool, v_pool = run.result()
    np.testing.assert_allclose(out[:3], wanted, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(k_pool, rest[0])
    np.testing.assert_array_equal(v_pool, rest[1])
