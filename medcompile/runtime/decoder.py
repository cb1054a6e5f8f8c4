"""The border between a decoder's model step and everything above it: six integer arrays in, logits out.

Whoever runs the graph (a backend's executor, a fake in tests) is a StepModel and owns the pools of keys and values.
Which tokens go into a step, and which blocks hold them, is decided above, in scheduler.py and kv_cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepBatch:
    """One step's tokens, ragged: those of all sequences lie end to end, none is padded.

    input_ids, positions: int64 [tokens]; a token's position counts from the start of its own sequence.
    query_starts: int32 [sequences + 1]; sequence i owns the tokens query_starts[i] to query_starts[i + 1].
    past_lens: int32 [sequences]; tokens of each sequence whose keys and values the pools hold already.
    block_table: int32 [sequences, table]; entry j of row i is the block of the tokens from j * block_size on. Entries
    beyond the last one that this step reads or writes are 0 and mean nothing.
    logit_rows: int64 [rows], ascending; the tokens whose logits are wanted. None may be: a chunk of a prompt.
    """

    input_ids: Array
    positions: Array
    query_starts: Array
    past_lens: Array
    block_table: Array
    logit_rows: Array


class StepModel(Protocol):
    """A model that advances several sequences at once and keeps their keys and values in blocks.

    blocks: how many there are, numbered from 0; block_size: tokens in each; vocabulary: width of the logits.
    """

    @property
    def block_size(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...

    def step(self, batch: StepBatch) -> Array:
        """Write the batch's keys and values at their positions, attend, and return logits, float32 [rows, vocabulary].

        The result may be a buffer that the next step overwrites.
        """

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination), in every layer's pools; destinations are distinct."""

    def close(self) -> None: ...
