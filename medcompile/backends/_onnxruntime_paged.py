"""Decoders on ONNX Runtime's CPU provider, behind the runtime's StepModel. Loading half: no onnx here.

rewrites/onnxruntime_paged.py says what the graph takes. Here a ragged batch is laid out in tiles, and the pools, which
this class owns, are bound once: each as input and output in one, so that a step's time does not depend on their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends._host_pools import POOLS
from medcompile.backends._onnxruntime_step import BoundStepModel

if TYPE_CHECKING:
    import onnxruntime as ort

    from medcompile.runtime.decoder import StepBatch

    Array = np.ndarray[Any, Any]

BLOCK_SIZE = 32
_CONTEXT, _BIAS = "context.", "bias."
# What a tile costs beside its queries, in queries: gathering its context, and packing it for a product.
_TILE_COST = 8


class OnnxRuntimeStepModel(BoundStepModel):
    """A decoder of standard operators, over tiles of the batch."""

    def __init__(self, session: ort.InferenceSession, *, blocks: int, block_size: int = BLOCK_SIZE) -> None:
        super().__init__(session, blocks=blocks, block_size=block_size)
        self._windows: list[int] = []
        for node in session.get_inputs():
            if node.name.startswith(POOLS):
                _, self._kv_heads, _, head_dim = node.shape
                # Takes memory as blocks are written. Zeros, for what a mask hides is multiplied all the same.
                pool = np.zeros((blocks, self._kv_heads, block_size, head_dim), np.float32)
                place = ("cpu", 0, np.float32, pool.shape, pool.ctypes.data)
                self._binding.bind_input(node.name, *place)
                self._binding.bind_output(f"{node.name}/updated", *place)
                self._pools.append(pool)
            elif node.name.startswith(_CONTEXT):
                self._windows.append(int(node.name.removeprefix(_CONTEXT)))

    def _feeds(self, batch: StepBatch) -> dict[str, Array]:
        return layout(batch, self.block_size, self._kv_heads, self._windows)


def layout(batch: StepBatch, block_size: int, kv_heads: int, windows: Sequence[int]) -> dict[str, Array]:
    """The inputs of the rewritten graph but for its pools."""
    starts, past, table = (a.astype(np.int64) for a in (batch.query_starts, batch.past_lens, batch.block_table))
    new = np.diff(starts)
    width = tile_width(new)
    tiles = -(-new // width)
    first_tile = np.cumsum(tiles) - tiles
    of_token = np.repeat(np.arange(len(new)), new)
    offset = np.arange(len(of_token)) - starts[of_token]

    of_tile = np.repeat(np.arange(len(new)), tiles)
    begin = (
        np.arange(len(of_tile)) - first_tile[of_tile]
    ) * width  # the tile's first token, in its sequence's new ones
    inside = np.minimum(begin[:, None] + np.arange(width), new[of_tile, None] - 1)  # its last one again, as padding
    query_at = past[of_tile, None] + inside

    heads = np.arange(kv_heads)
    position = past[of_token] + offset
    slots = np.empty((len(of_token), kv_heads, 3), np.int64)
    slots[..., 0] = table[of_token, position // block_size][:, None]
    slots[..., 1] = heads
    slots[..., 2] = (position % block_size)[:, None]
    feeds = {
        "input_ids": batch.input_ids,
        "positions": batch.positions,
        "logit_rows": batch.logit_rows,
        "slots": slots,
        "grid": starts[of_tile, None] + inside,
        "back": (first_tile[of_token] + offset // width) * width + offset % width,
    }
    for window in windows:
        first = np.maximum(0, query_at[:, 0] - window + 1) // block_size if window else np.zeros_like(of_tile)
        count = int((query_at[:, -1] // block_size + 1 - first).max())
        entries = np.minimum(first[:, None] + np.arange(count), table.shape[1] - 1)
        context = np.empty((len(of_tile), kv_heads, count, 2), np.int64)
        context[..., 0] = table[of_tile[:, None], entries][:, None]
        context[..., 1] = heads[:, None]
        key_at = (first[:, None] * block_size + np.arange(count * block_size))[:, None]
        seen = key_at <= query_at[..., None]
        if window:
            seen &= key_at > query_at[..., None] - window
        feeds[f"{_CONTEXT}{window}"] = context
        feeds[f"{_BIAS}{window}"] = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None, :, None]
    return feeds


def tile_width(new: Array) -> int:
    """The width of tiles that costs least where sequences have so many new tokens each.

    One width for a chunk of a prompt and the single tokens beside it: wide tiles are mostly padding for the second,
    and every tile gathers its context for itself.
    """
    longest = int(new.max())
    widths = [*(1 << i for i in range(longest.bit_length()) if 1 << i < longest), longest]
    return min(widths, key=lambda width: int((-(-new // width)).sum()) * (width + _TILE_COST))
