"""The paged-attention kernels, in Triton. reference.py says what they compute, launches.py which of them run when.

`write` puts the new keys and values into the pools. `attend` walks over a sequence's keys for one tile of queries,
with the softmax kept up to date on the way; a tile holds some tokens of one sequence times the query heads that share
a key head. It runs as `chunks` and `steps`, which differ in the size of a tile, and as `splits`, where several
programs share the keys of a tile and `reduce` joins what they found. Products are made in the pools' dtype, sums in
float32. All arrays are contiguous.

Imported where kernels are compiled (ptx.py) or interpreted (TRITON_INTERPRET=1), never where they run.
Source of the method: Dao, FlashAttention-2 (arXiv 2307.08691), and Flash-Decoding for the splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from medcompile.kernels.launches import MAX_SPLITS, Face, Kernel, power_of_two

_KEYS = 64
"""Keys of one round of attend, where they are small enough."""


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel. function: of this file, a triton.jit one. constants: its constexpr arguments."""

    function: Any
    constants: dict[str, int]
    warps: int
    stages: int = 1


def variant(face: Face, kernel: Kernel) -> Variant:
    """How that kernel is compiled for a model's attention."""
    shape = {"HEADS": face.heads, "HEAD_DIM": face.head_dim}
    pools = {"KV_HEADS": face.kv_heads, "HEAD_DIM": face.head_dim, "BLOCK_SIZE": face.block_size}
    if kernel == "write":
        return Variant(write, {**pools, "WIDTH": power_of_two(face.kv_heads * face.head_dim)}, warps=4)
    if kernel == "reduce":
        return Variant(reduce, {**shape, "DIM": face.padded_dim, "SPLITS": MAX_SPLITS}, warps=2)
    # As few warps as leave ptxas enough registers, as much in flight as fits the 99 kB that every GPU since 8.0 has.
    wide = kernel == "chunks" and face.padded_dim >= 128
    small = face.key_bytes <= 256
    keys = _KEYS if small else _KEYS // 2
    tile = {"DIM": face.padded_dim, "ROWS": face.rows(kernel), "KEYS": keys, "SPLIT": int(kernel == "splits")}
    return Variant(attend, {**shape, **pools, **tile}, warps=8 if wide else 4, stages=3 if small else 2)


@triton.jit  # type: ignore[untyped-decorator]
def _sequence_of(query_starts, sequences, place, TOKENS: tl.constexpr, APART: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """The last sequence whose first tile is not after tile number `place`, when a tile holds TOKENS tokens.

    Sequence i's tiles begin at query_starts[i] // TOKENS + i * APART; APART is 1 where no two sequences share a tile.
    """
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // TOKENS + middle * APART <= place:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit  # type: ignore[untyped-decorator]
def write(  # type: ignore[no-untyped-def]
    k,
    v,
    k_pool,
    v_pool,
    query_starts,
    past_lens,
    block_table,
    sequences,
    table_width,
    KV_HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    """One program per new token. WIDTH: KV_HEADS * HEAD_DIM, up to a power of two."""
    token = tl.program_id(0)
    sequence = _sequence_of(query_starts, sequences, token, 1, 0)
    if token < tl.load(query_starts + sequence + 1):
        at = tl.load(past_lens + sequence) + token - tl.load(query_starts + sequence)
        block = tl.load(block_table + sequence.to(tl.int64) * table_width + at // BLOCK_SIZE).to(tl.int64)
        lane = tl.arange(0, WIDTH)
        real = lane < KV_HEADS * HEAD_DIM
        source = token.to(tl.int64) * (KV_HEADS * HEAD_DIM) + lane
        slot = (block * KV_HEADS + lane // HEAD_DIM) * BLOCK_SIZE + at % BLOCK_SIZE
        place = slot * HEAD_DIM + lane % HEAD_DIM
        tl.store(k_pool + place, tl.load(k + source, mask=real).to(k_pool.dtype.element_ty), mask=real)
        tl.store(v_pool + place, tl.load(v + source, mask=real).to(v_pool.dtype.element_ty), mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def] # noqa: PLR0915
    q,
    k_pool,
    v_pool,
    query_starts,
    past_lens,
    block_table,
    out,
    partial,
    stats,
    sequences,
    table_width,
    window,
    scale,
    HEADS: tl.constexpr,  # noqa: N803
    KV_HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
):
    """Program (tile, kv head, split). DIM: HEAD_DIM up to a power of two; KEYS: keys of one round.

    SPLIT: the result is not joined yet and goes to partial and stats instead of out.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS  # noqa: N806
    TOKENS: tl.constexpr = ROWS // GROUP  # noqa: N806
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _sequence_of(query_starts, sequences, tile, TOKENS, 1)
    start = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - start
    first_token = (tile - (start // TOKENS + sequence)) * TOKENS
    if first_token < length:
        past = tl.load(past_lens + sequence)
        row = tl.arange(0, ROWS)
        dim = tl.arange(0, DIM)
        token = first_token + row // GROUP
        real = (row < TOKENS * GROUP) & (token < length)
        head = kv_head * GROUP + row % GROUP
        result = (start + token).to(tl.int64) * HEADS + head  # [ROWS]: a token's head
        inside = real[:, None] & (dim < HEAD_DIM)[None, :]
        queries = tl.load(q + result[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
        queries = queries.to(k_pool.dtype.element_ty)

        end = past + tl.minimum(first_token + TOKENS, length)  # keys from here on are in no query's sight
        begin = tl.maximum(past + first_token - window + 1, 0)  # nor are those before this
        first = begin // KEYS
        last = (end + KEYS - 1) // KEYS
        if SPLIT:
            share = (last - first + tl.num_programs(2) - 1) // tl.num_programs(2)
            first += tl.program_id(2) * share
            last = tl.minimum(last, first + share)

        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, DIM], tl.float32)
        blocks = block_table + sequence.to(tl.int64) * table_width
        key = tl.arange(0, KEYS)
        log2_e = 1.4426950408889634
        at = first * KEYS + key
        block = tl.load(blocks + at // BLOCK_SIZE, mask=(at < end) & (at >= begin), other=0)
        for part in range(first, last):
            at = part * KEYS + key
            held = (at < end) & (at >= begin)
            slot = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
            # The next round's blocks are asked for now: a load that waits for another is not pipelined.
            block = tl.load(blocks + (at + KEYS) // BLOCK_SIZE, mask=at + KEYS < end, other=0)
            place = slot[:, None] * HEAD_DIM + dim[None, :]
            # A slot that no token fills may hold NaN, which a weight of 0 would not take away.
            filled = held[:, None] & (dim < HEAD_DIM)[None, :]
            keys = tl.load(k_pool + place, mask=filled, other=0.0)
            values = tl.load(v_pool + place, mask=filled, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * log2_e)
            now = (past + token)[:, None]
            seen = held[None, :] & (at[None, :] <= now) & (at[None, :] > now - window)
            scores = tl.where(seen, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a row that has seen no key yet
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None]
            mixed += tl.dot(weights.to(v_pool.dtype.element_ty), values, input_precision="ieee")
            largest = new_largest

        if SPLIT:
            place = result * tl.num_programs(2) + tl.program_id(2)
            tl.store(partial + place[:, None] * HEAD_DIM + dim[None, :], mixed, mask=inside)
            tl.store(stats + place * 2, largest, mask=real)
            tl.store(stats + place * 2 + 1, total, mask=real)
        else:
            mixed = mixed / total[:, None]
            place = result[:, None] * HEAD_DIM + dim[None, :]
            tl.store(out + place, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def reduce(  # type: ignore[no-untyped-def]
    partial,
    stats,
    out,
    splits,
    HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
):
    """Program (token, head): join what `splits` programs found. SPLITS: the most that there can be."""
    result = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM)
    real = split < splits
    place = result * splits + split
    largest = tl.load(stats + place * 2, mask=real, other=float("-inf"))
    total = tl.load(stats + place * 2 + 1, mask=real, other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))  # one of them has seen a key: the token itself
    inside = real[:, None] & (dim < HEAD_DIM)[None, :]
    mixed = tl.load(partial + place[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    joined = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + result * HEAD_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
