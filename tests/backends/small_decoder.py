"""A decoder of numpy behind the face of our graphs, for step models over fakes of a device: pools change in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from medcompile.kernels.reference import paged_attention
from medcompile.runtime.decoder import StepBatch
from medcompile.spec import Axis, GraphSpec, Profile, TensorSpec

Array = np.ndarray[Any, Any]

LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, VOCABULARY = 2, 4, 2, 8, 16, 40
WIDTH = HEADS * HEAD_DIM
POOLS = tuple(f"{kind}_pool.{layer}" for layer in range(LAYERS) for kind in "kv")
INTEGERS = (
    TensorSpec("input_ids", "int64", ("tokens",)),
    TensorSpec("positions", "int64", ("tokens",)),
    TensorSpec("query_starts", "int32", ("bounds",)),
    TensorSpec("past_lens", "int32", ("sequences",)),
    TensorSpec("block_table", "int32", ("sequences", "table")),
    TensorSpec("logit_rows", "int64", ("rows",)),
)
POOL = ("blocks", KV_HEADS, BLOCK_SIZE, HEAD_DIM)
POOL_BLOCK_BYTES = KV_HEADS * BLOCK_SIZE * HEAD_DIM * 2


def profile(name: str, tokens: tuple[int, int, int]) -> Profile:
    sizes = {"tokens": tokens, "sequences": (1, 2, 4), "bounds": (2, 3, 5), "table": (1, 2, 8), "rows": tokens}
    return Profile(name, tuple(Axis(axis, *ends) for axis, ends in (sizes | {"blocks": (1, 12, 24)}).items()))


SPEC = GraphSpec(
    "generate",
    (*INTEGERS, *(TensorSpec(name, "float16", POOL) for name in POOLS)),
    (TensorSpec("logits", "float32", ("rows", VOCABULARY)),),
    (profile("prefill", (1, 32, 64)), profile("decode", (1, 2, 16))),
)
_random = np.random.default_rng(5)
WEIGHTS = {
    name: (_random.standard_normal(shape) / 4).astype(np.float32)
    for name, shape in {
        "tokens": (VOCABULARY, WIDTH),
        "positions": (256, WIDTH),
        **{f"qkv.{layer}": (WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for layer in range(LAYERS)},
        "head": (WIDTH, VOCABULARY),
    }.items()
}


def decode(given: dict[str, Array]) -> dict[str, Array]:
    """What the fake engine computes: a small decoder, whose pools are updated where they lie."""
    x = WEIGHTS["tokens"][given["input_ids"]] + WEIGHTS["positions"][given["positions"]]
    where = [given[name] for name in ("query_starts", "past_lens", "block_table")]
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5}
    for layer in range(LAYERS):
        q, k, v = np.split(x @ WEIGHTS[f"qkv.{layer}"], [WIDTH, WIDTH + KV_HEADS * HEAD_DIM], axis=1)
        pools = given[f"k_pool.{layer}"], given[f"v_pool.{layer}"]
        x = x + paged_attention(q, k, v, *pools, *where, **shape)
    return {"logits": (x[given["logit_rows"]] @ WEIGHTS["head"]).astype(np.float32)}


def batch(past: list[int], new: list[int], *, first_block: int = 0, rows: list[int] | None = None) -> StepBatch:
    """Sequences with so many tokens in the pools and so many new ones, each in blocks of its own."""
    starts = np.cumsum([0, *new]).astype(np.int32)
    used = max(-(-(p + n) // BLOCK_SIZE) for p, n in zip(past, new, strict=True))
    return StepBatch(
        input_ids=np.arange(starts[-1]) % VOCABULARY,
        positions=np.concatenate([p + np.arange(n) for p, n in zip(past, new, strict=True)]),
        query_starts=starts,
        past_lens=np.array(past, np.int32),
        block_table=(first_block + np.arange(len(new) * used, dtype=np.int32)).reshape(len(new), used),
        logit_rows=np.array(starts[1:] - 1 if rows is None else rows, np.int64),
    )


def alone(step: StepBatch, pools: dict[str, Array] | None = None) -> Array:
    """The logits of a step without a device."""
    pools = pools or {name: np.zeros((24, *POOL[1:]), np.float16) for name in POOLS}
    return decode(vars(step) | pools)["logits"]
