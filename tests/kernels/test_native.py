"""Our own CPU kernels, every instruction set that this machine has, against numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.kernels import native
from medcompile.kernels.reference import paged_attention
from tests.kernels.batches import Array, draw

if not native.available():
    pytest.skip("medcompile was installed without a C++ compiler", allow_module_level=True)

LIBRARY: Any = ctypes.CDLL(str(native.library()))
SETS = native.INSTRUCTION_SETS[: LIBRARY.medcompile_best_isa() + 1]
every_set = pytest.mark.parametrize("isa", range(len(SETS)), ids=SETS)


def pointer(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


def bfloat16(values: Array) -> Array:
    """Rounded to nearest, ties to even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(values: Array) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32)


def product(isa: int, x: Array, packed: Array, n: int, block: int, up: Array | None = None) -> Array:
    out = np.full((len(x), n), 7, np.float32)
    second = None if up is None else pointer(up)
    LIBRARY.medcompile_matmul_int4(isa, pointer(x), *x.shape, n, block, pointer(packed), second, pointer(out))
    return out


def rounded_product(x: Array, weight: Array, scale: Array) -> Array:
    """What MatMulInt4 computes, in float64 but for the rounding of x, which is float32's."""
    groups = len(scale)
    x, weight = x.reshape(len(x), groups, -1), weight.reshape(groups, -1, weight.shape[1])
    most = np.abs(x).max(axis=2)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    codes = np.rint(x * inverse[..., None]).astype(np.float64)
    step = (most / np.float32(127)).astype(np.float64)
    return np.einsum("mgk,gkn,gn,mg->mn", codes, weight.astype(np.float64), scale.astype(np.float64), step)


@every_set
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 21),
    groups=st.integers(1, 5),
    n=st.integers(1, 100),
    block=st.sampled_from([16, 32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_int4_products_are_sums_of_whole_numbers_scaled(
    isa: int, m: int, groups: int, n: int, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-8, 8, (groups * block, n), np.int8)
    scale = rng.uniform(0.01, 1, (groups, n)).astype(np.float32)
    x = (rng.standard_normal((m, groups * block)) * 10.0 ** rng.integers(-3, 4, (m, 1))).astype(np.float32)
    x[rng.random((m, groups * block)) < 0.2] = 0
    right = rounded_product(x, weight, scale)
    found = product(isa, x, native.pack(weight, scale), n, block)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


@every_set
@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 11), n=st.integers(1, 70), size=st.sampled_from([0.01, 1, 30]), seed=st.integers(0, 99))
def test_a_gate_passes_its_product_by_silu(isa: int, m: int, n: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate, up = ((rng.integers(-8, 8, (64, n), np.int8), rng.uniform(0.01, 0.1, (2, n))) for _ in range(2))
    x = (size * rng.standard_normal((m, 64))).astype(np.float32)
    passed, right = (rounded_product(x, weight, scale.astype(np.float32)) for weight, scale in (gate, up))
    right *= passed / (1 + np.exp(-passed))
    packed = [native.pack(weight, scale.astype(np.float32)) for weight, scale in (gate, up)]
    found = product(isa, x, packed[0], n, 32, packed[1])
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


@every_set
def test_extreme_weights_and_activations_overflow_nowhere(isa: int) -> None:
    weight = np.full((256, 32), -8, np.int8)
    weight[:, 1::2] = 7
    x = np.full((3, 256), 1e4, np.float32) * np.array([[1], [-1], [0]], np.float32)
    found = product(isa, x, native.pack(weight, np.ones((2, 32), np.float32)), 32, 128)
    np.testing.assert_allclose(found, x @ weight.astype(np.float32), rtol=1e-6)


@every_set
def test_nan_in_a_row_stays_visible_and_in_that_row(isa: int) -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 5] = np.nan
    packed = native.pack(np.ones((64, 40), np.int8), np.ones((2, 40), np.float32))
    found = product(isa, x, packed, 40, 32)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_packed_weights_take_half_a_byte_each_and_a_scale_per_block() -> None:
    packed = native.pack(np.zeros((256, 96), np.int8), np.zeros((2, 96), np.float32))
    assert packed.shape == (3, 2 * (128 + 128 * 16))


@every_set
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([8, 32, 64, 80, 128, 256]),
    window=st.sampled_from([0, 0, 1, 17, 32, 50]),
    seed=st.integers(0, 99),
)
def test_attention_is_the_reference_s(
    isa: int,
    narrow: bool,
    lengths: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int,
    seed: int,
) -> None:
    heads, scale = kv_heads * group, head_dim**-0.5
    batch = draw(lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=32, seed=seed)
    q, k, v, k_pool, v_pool, starts, past, table = batch.arrays  # pools hold NaN where nothing was written
    if narrow:
        k, v, k_pool, v_pool = (widened(bfloat16(a)) for a in (k, v, k_pool, v_pool))
    kept: list[Array] = [np.ascontiguousarray(k_pool.swapaxes(2, 3)), v_pool.copy()]
    if narrow:
        kept = [bfloat16(pool) for pool in kept]
    face = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    right = paged_attention(q, k, v, k_pool, v_pool, starts, past, table, **face, scale=scale, sliding_window=window)
    out = np.full_like(q, 7)
    LIBRARY.medcompile_paged_attention(
        isa,
        *(pointer(a) for a in (q, k, v, *kept)),
        int(narrow),
        *(pointer(a) for a in (starts, past, table)),
        *(len(past), table.shape[1], kv_heads, group, head_dim, window),
        ctypes.c_float(scale),
        pointer(out),
    )
    np.testing.assert_allclose(out, right, atol=3e-6)
    wide = [widened(pool) for pool in kept] if narrow else kept
    np.testing.assert_array_equal(wide[0].swapaxes(2, 3), k_pool)
    np.testing.assert_array_equal(wide[1], v_pool)
