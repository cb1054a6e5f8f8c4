"""A StepModel whose keys and values are the tokens themselves, so that a wrong block gives an error or a wrong token.

A slot of the shadow pool holds a token and a hash of everything up to it, as a real slot's values depend on all before.
Logits are a function of what a query sees in the pool, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from medcompile.runtime.decoder import StepBatch

Array = np.ndarray[Any, Any]

_MOD = (1 << 61) - 1
_EMPTY = 7


def _fold(history: int, token: int) -> int:
    return (history * 1_000_003 + token + 1) % _MOD


class FakeDecoder:
    """repeats: of 10 positions, how many go on as the text did three tokens before: what a guess finds."""

    def __init__(self, *, blocks: int = 16, block_size: int = 4, vocabulary: int = 24, repeats: int = 6) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.vocabulary = vocabulary
        self.closed = False
        self.batches: list[StepBatch] = []
        self.computed_tokens = 0
        self._repeats = repeats
        self._tokens = np.full((blocks, block_size), -1, np.int64)
        self._histories = np.zeros((blocks, block_size), np.int64)

    def logits(self, tokens: Sequence[int], history: int | None = None) -> Array:
        """What follows these tokens, float32 [vocabulary]."""
        if history is None:
            history = _EMPTY
            for token in tokens:
                history = _fold(history, token)
        mixed = (np.arange(1, self.vocabulary + 1, dtype=np.uint64) * np.uint64(history | 1)) ^ np.uint64(history)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        row = ((mixed >> np.uint64(40)) / 2**22).astype(np.float32)  # 0 to 4
        if len(tokens) >= 3 and history % 10 < self._repeats:
            row[tokens[-3]] += 5
        return row

    def greedy(self, prompt: Sequence[int], count: int, end: int | None = None) -> list[int]:
        """The answer that any schedule must give."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            tokens.append(int(self.logits(tokens).argmax()))
            if tokens[-1] == end:
                break
        return tokens[len(prompt) :]

    def step(self, batch: StepBatch) -> Array:
        self._check(batch)
        self.batches.append(batch)
        self.computed_tokens += len(batch.input_ids)
        starts = batch.query_starts.tolist()
        rows = batch.logit_rows.tolist()
        found = []
        written: set[tuple[int, int]] = set()
        for i, (start, end) in enumerate(pairwise(starts)):
            past = int(batch.past_lens[i])
            seen, history = self._read(batch.block_table[i], past)
            for at in range(start, end):
                token, position = int(batch.input_ids[at]), past + at - start
                history = _fold(history, token)
                seen.append(token)
                place = int(batch.block_table[i, position // self.block_size]), position % self.block_size
                assert place not in written, f"two sequences write to {place}"
                written.add(place)
                self._tokens[place] = token
                self._histories[place] = history
                if at in rows:
                    found.append(self.logits(seen, history))
        for i, past in enumerate(batch.past_lens.tolist()):  # nobody wrote where another one reads
            self._read(batch.block_table[i], past)
        return np.stack(found) if found else np.zeros((0, self.vocabulary), np.float32)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        assert len({d for _, d in pairs}) == len(pairs)
        for source, destination in pairs:
            self._tokens[destination] = self._tokens[source]
            self._histories[destination] = self._histories[source]

    def close(self) -> None:
        self.closed = True

    def _read(self, table: Array, past: int) -> tuple[list[int], int]:
        """A sequence's tokens in the pool, and their hash: every slot was written as part of this very sequence."""
        tokens: list[int] = []
        history = _EMPTY
        for position in range(past):
            block, slot = int(table[position // self.block_size]), position % self.block_size
            token = int(self._tokens[block, slot])
            assert token >= 0, f"block {block} slot {slot} is read before it was written"
            tokens.append(token)
            history = _fold(history, token)
            assert self._histories[block, slot] == history, f"block {block} slot {slot} is another sequence's"
        return tokens, history

    def _check(self, batch: StepBatch) -> None:
        assert batch.input_ids.dtype == batch.positions.dtype == batch.logit_rows.dtype == np.int64
        assert batch.query_starts.dtype == batch.past_lens.dtype == batch.block_table.dtype == np.int32
        assert batch.query_starts[0] == 0
        assert batch.query_starts[-1] == len(batch.input_ids) == len(batch.positions)
        lengths = np.diff(batch.query_starts)
        assert (lengths > 0).all()
        expected = np.concatenate([p + np.arange(n) for p, n in zip(batch.past_lens, lengths, strict=True)])
        assert (batch.positions == expected).all()
        assert batch.block_table.shape[0] == len(lengths)
        assert ((batch.block_table >= 0) & (batch.block_table < self.blocks)).all()
        assert (np.diff(batch.logit_rows) > 0).all()


def letters(vocabulary: int = 24) -> Tokenizer:
    """A tokenizer whose token i is the i-th letter from a on."""
    vocab = {chr(ord("a") + i): i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
