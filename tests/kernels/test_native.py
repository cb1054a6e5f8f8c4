"""Our own CPU kernels, every instruction set that this machine has, against numpy."""

from __future__ import annotations

import ctypes
import math
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
Weight = tuple[Array, Array]
"""int8 [k, n]; float32 scales [k / block, n]."""
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


def product(isa: int, bits: int, x: Array, weight: Weight, up: Weight | None = None, **finish: Any) -> Array:
    """x times a weight; finish: bias, gelu."""
    out, block = np.full((len(x), weight[0].shape[1]), 7, np.float32), len(weight[0]) // len(weight[1])
    packed, second = native.pack(*weight, bits), None if up is None else native.pack(*up, bits)
    bias = finish.get("bias")
    LIBRARY.medcompile_product(
        *(isa, bits, pointer(x), *x.shape, out.shape[1], block, pointer(packed)),
        *(None if a is None else pointer(a) for a in (second, bias)),
        *(int(finish.get("gelu", False)), pointer(out)),
    )
    return out


def drawn(rng: np.random.Generator, bits: int, groups: int, block: int, n: int) -> Weight:
    """A weight and its scales, that makes numbers of about one out of such numbers."""
    least = -(1 << (bits - 1))
    weight = rng.integers(least, -least, (groups * block, n), np.int8)
    return weight, (rng.uniform(0.5, 2, (groups, n)) / (-least * (groups * block) ** 0.5)).astype(np.float32)


def rounded_product(x: Array, weight: Array, scale: Array) -> Array:
    """What a product computes, in float64 but for the rounding of x, which is float32's."""
    groups = len(scale)
    x, weight = x.reshape(len(x), groups, -1), weight.reshape(groups, -1, weight.shape[1])
    most = np.abs(x).max(axis=2)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    codes = np.rint(x * inverse[..., None]).astype(np.float64)
    step = (most / np.float32(127)).astype(np.float64)
    return np.einsum("mgk,gkn,gn,mg->mn", codes, weight.astype(np.float64), scale.astype(np.float64), step)


@every_set
@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 21),
    groups=st.integers(1, 5),
    n=st.integers(1, 100),
    block=st.sampled_from([16, 32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_products_are_sums_of_whole_numbers_scaled(
    isa: int, bits: int, m: int, groups: int, n: int, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = drawn(rng, bits, groups, block, n)
    x = (rng.standard_normal((m, groups * block)) * 10.0 ** rng.integers(-3, 4, (m, 1))).astype(np.float32)
    x[rng.random((m, groups * block)) < 0.2] = 0
    right = rounded_product(x, *weight)
    np.testing.assert_allclose(product(isa, bits, x, weight), right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


@every_set
@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 11), n=st.integers(1, 70), size=st.sampled_from([0.01, 1, 30]), seed=st.integers(0, 99))
def test_what_follows_a_product_is_done_in_it(isa: int, bits: int, m: int, n: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, up = (drawn(rng, bits, 2, 32, n) for _ in range(2))
    x = (size * rng.standard_normal((m, 64))).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    first, second = rounded_product(x, *weight), rounded_product(x, *up)
    biased = first + bias
    cases = [
        (first / (1 + np.exp(-first)) * second, {"up": up}),
        (biased, {"bias": bias}),
        (biased * (1 + np.vectorize(math.erf)(biased / 2**0.5)) / 2, {"bias": bias, "gelu": True}),
    ]
    for right, finish in cases:
        found = product(isa, bits, x, weight, **finish)
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * np.abs(right).max() + 1e-6 * size)


@every_set
@pytest.mark.parametrize(("bits", "block"), [(4, 128), (8, 128), (8, 3072)])
def test_extreme_weights_and_activations_overflow_nowhere(isa: int, bits: int, block: int) -> None:
    most = (1 << (bits - 1)) - 1
    weight = np.full((3072, 32), -most - 1, np.int8)
    weight[:, 1::2] = most
    x = np.full((3, 3072), 1e4, np.float32) * np.array([[1], [-1], [0]], np.float32)
    found = product(isa, bits, x, (weight, np.ones((3072 // block, 32), np.float32)))
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight, rtol=1e-6)


@every_set
def test_nan_in_a_row_stays_visible_and_in_that_row(isa: int) -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 5] = np.nan
    found = product(isa, 4, x, (np.ones((64, 40), np.int8), np.ones((2, 40), np.float32)))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_take_their_bits_and_a_scale_per_block(bits: int) -> None:
    packed = native.pack(np.zeros((256, 96), np.int8), np.zeros((2, 96), np.float32), bits)
    assert packed.shape == (3, 2 * (128 + 128 * 32 * bits // 8))


@every_set
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@settings(max_examples=25, deadline=None)
@given(
    sequences=st.integers(1, 3),
    tokens=st.integers(1, 150),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 24, 32, 64, 80, 256]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_self_attention_is_softmax_of_scaled_products(
    isa: int, narrow: bool, sequences: int, tokens: int, heads: int, head_dim: int, masked: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((sequences, tokens, 3, heads, head_dim)).astype(np.float32)
    kept = rng.random((sequences, tokens)) < 0.7
    kept[:, 0] = True
    mask = np.where(kept, np.float32(0), np.finfo(np.float32).min)
    q, k, v = qkv.astype(np.float64).transpose(2, 0, 3, 1, 4)  # each [sequences, heads, tokens, head_dim]
    scores = q @ k.swapaxes(2, 3) * head_dim**-0.5 + (mask[:, None, None] if masked else 0)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    right = (weights / weights.sum(axis=3, keepdims=True) @ v).swapaxes(1, 2)
    out = np.full(right.shape, 7, np.float32)
    scale = ctypes.c_float(head_dim**-0.5)
    LIBRARY.medcompile_self_attention(
        *(isa, pointer(qkv), pointer(mask) if masked else None, sequences, tokens, heads, head_dim, scale),
        *(int(narrow), pointer(out)),
    )
    np.testing.assert_allclose(out, right, atol=0.03 if narrow else 2e-5)


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
