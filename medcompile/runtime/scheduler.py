"""Which sequences advance in the next step, by how many tokens, and in which blocks: continuous batching.

A sequence is tokens, of which the first `computed` have their keys and values in blocks; a step computes some of the
rest. So a prompt, a chunk of one, a next token and a preempted sequence's recompute are one and the same thing.
What the tokens are is not decided here (generator.py, sampling.py), nor who owns a block (kv_cache.py).

Order is total and never changes: a sequence's turn is its arrival (in steps) plus its priority times `ageing`, so
waiting makes up for priority, and whoever arrives `ageing` steps later per level of priority can't go before.
Blocks are taken from the back of that order when they run out, so the front always advances, and all come to the front.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medcompile.runtime.decoder import StepBatch
from medcompile.runtime.kv_cache import BlockPool, block_hashes
from medcompile.runtime.speculation import Lookup

Array = np.ndarray[Any, Any]

LIKELY = 0.6
"""The chance at which a guessed token is worth its share of a step that computes many tokens."""


@dataclass(eq=False)
class Sequence:
    """A request's tokens and blocks. buffer: int64, as long as the sequence may become; its prompt stands in front."""

    buffer: Array
    prompt_length: int
    turn: tuple[int, int] = (0, 0)  # its place in the order
    salt: str = ""
    lookup: Lookup | None = None
    length: int = 0
    computed: int = 0
    cached: int = 0  # tokens of the prompt that were found in the pool when it first ran
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    copy: tuple[int, int] | None = None  # a shared block and our own, which must hold the same before the next step
    published: int = 0

    @property
    def tokens(self) -> Array:
        return self.buffer[: self.length]

    @property
    def pending(self) -> int:
        """Tokens still to be computed; never 0, as the last one gives the logits of the next."""
        return self.length - self.computed


@dataclass
class Work:
    """What a step does for one sequence: compute its next count tokens, then check guessed ones after them.

    ends: whether it reaches the sequence's end and so gives logits for its next token. draft: the part of the guess
    that this step checks.
    """

    sequence: Sequence
    count: int
    ends: bool
    draft: Array
    guess: Array


class Scheduler:
    """Decides step after step. Not thread-safe: its owner locks.

    step_tokens: tokens in one step at most. running at once: at most `slots` sequences. cheap_tokens: a step of so
    many costs about what a step of one does, so guesses that fill it up are free.
    """

    def __init__(self, pool: BlockPool, *, step_tokens: int, slots: int, ageing: int, cheap_tokens: int) -> None:
        assert 0 < slots <= step_tokens
        self.pool = pool
        self.waiting: list[Sequence] = []  # both in order of turn
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._step_tokens = step_tokens
        self._slots = slots
        self._ageing = ageing
        self._cheap_tokens = cheap_tokens
        self._clock = 0
        self._arrivals = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def add(self, sequence: Sequence, priority: int = 0) -> None:
        """Let it wait. buffer holds its prompt; a smaller priority goes first."""
        self._arrivals += 1
        sequence.turn = (self._clock + priority * self._ageing, self._arrivals)
        sequence.length = sequence.prompt_length
        insort(self.waiting, sequence, key=_turn)

    def remove(self, sequence: Sequence) -> bool:
        """Done with, or cancelled: its blocks are free at once. False if it was not here any more."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
                self._release(sequence)
                return True
        return False

    def plan(self) -> list[Work]:
        """The next step; empty only if nothing waits or runs. Nothing counts as computed until commit()."""
        self._clock += 1
        self._grow()
        self._admit()
        works = []
        room = self._step_tokens
        # Those that have one token to go come first: a long prompt must not hold up others' answers.
        for s in sorted(self.running, key=lambda s: s.pending > 1):
            count = min(s.pending, room)
            if count:
                works.append(Work(s, count, count == s.pending, s.buffer[:0], s.buffer[:0]))
                room -= count
        self._guess(works, self._step_tokens - room)
        return works

    def commit(self, work: Work, chosen: Array) -> None:
        """After the step: its tokens are in the pools, and these were chosen to follow (none for part of a prompt).

        chosen: accepted guesses and one more. Does nothing for a sequence that was removed meanwhile.
        """
        s = work.sequence
        if s not in self.running:
            return
        if s.copy:
            self.pool.release([s.copy[0]])
            s.copy = None
        s.computed += work.count + max(0, len(chosen) - 1)
        s.buffer[s.length : s.length + len(chosen)] = chosen
        s.length += len(chosen)
        full = s.computed // self.pool.block_size
        if full > s.published:
            s.hashes = block_hashes(s.tokens, self.pool.block_size, s.hashes, s.salt)
            for block, value in zip(s.blocks[s.published : full], s.hashes[s.published : full], strict=True):
                self.pool.publish(block, value)
            s.published = full

    # ---- blocks

    def _grow(self) -> None:
        """A block for every running sequence whose next token needs one, from the back of the order if need be."""
        for s in list(self.running):
            while s in self.running and len(s.blocks) < self.blocks_for(s.length):
                if self.pool.free:
                    s.blocks += self.pool.allocate(1)
                else:
                    self._preempt()

    def _admit(self) -> None:
        """Let those run whose turn it is: with blocks for all tokens they have, and one more for each that runs."""
        at = 0
        while at < min(len(self.waiting), self._slots) and sum(s.pending for s in self.running) < self._step_tokens:
            s = self.waiting[at]
            if self._soon_cached(s):
                at += 1
                continue
            while not (len(self.running) < self._slots and self._seat(s)):
                if not self._may_preempt_for(s):
                    return
                self._preempt()
            self.waiting.remove(s)
            insort(self.running, s, key=_turn)

    def _seat(self, s: Sequence) -> bool:
        """Give a waiting sequence its blocks: those that hold its first tokens already, and new ones for the rest."""
        size = self.pool.block_size
        s.hashes = block_hashes(s.tokens, size, s.hashes, s.salt)
        found = self.pool.find(s.hashes)
        total = self.blocks_for(s.length)
        while True:
            # One whose last token is in the pool too has that computed again, for its logits, in a block of its own.
            copied = len(found) * size == s.length
            unowned = sum(not self.pool.owners(b) for b in found)
            if total - len(found) + copied + unowned + len(self.running) <= self.pool.free:
                break
            if not copied:
                return False
            found.pop()
        self.pool.share(found)
        s.blocks = found + self.pool.allocate(total - len(found))
        s.published = len(found)
        s.computed = len(found) * size
        if copied:
            (own,) = self.pool.allocate(1)
            s.copy = (s.blocks[-1], own)
            s.blocks[-1] = own
            s.published -= 1
            s.computed -= 1
        if s.length == s.prompt_length:
            s.cached = s.computed
        return True

    def _soon_cached(self, s: Sequence) -> bool:
        """Whether one that goes before is computing the very block that this one needs next: then it waits for it."""
        s.hashes = block_hashes(s.tokens, self.pool.block_size, s.hashes, s.salt)
        at = len(self.pool.find(s.hashes))
        wanted = s.hashes[at : at + 1]
        return wanted != [] and any(
            r.turn < s.turn and r.published <= at and r.hashes[at : at + 1] == wanted for r in self.running
        )

    def _may_preempt_for(self, s: Sequence) -> bool:
        """Whether those running that come after s hold what it lacks."""
        later = [r for r in self.running if r.turn > s.turn]
        held = sum(len(r.blocks) for r in later)
        need = self.blocks_for(s.length) + len(self.running) - len(later)
        return bool(later) and need <= self.pool.free + held

    def _preempt(self) -> None:
        """The last in order gives its blocks up and waits; what it had is computed again, but for what is cached."""
        s = self.running.pop()
        self._release(s)
        insort(self.waiting, s, key=_turn)
        self.preemptions += 1

    def _release(self, s: Sequence) -> None:
        self.pool.release(s.blocks)
        if s.copy:
            self.pool.release([s.copy[0]])
        s.blocks, s.copy = [], None
        s.computed = s.published = 0

    # ---- guesses

    def _guess(self, works: list[Work], tokens: int) -> None:
        """Add guessed tokens to a step of so many, while they are free or likely. They take no other's block."""
        for work in works:
            s = work.sequence
            if s.lookup is None or s.pending > 1:
                continue
            work.guess = s.lookup.guess(s.tokens, len(s.buffer) - s.length - 1)
            count = 0
            while count < len(work.guess) and tokens < self._step_tokens:
                if tokens >= self._cheap_tokens and s.lookup.chance ** (count + 1) < LIKELY:
                    break
                if self.blocks_for(s.length + count + 1) > len(s.blocks):
                    if self.pool.free <= len(self.running):
                        break
                    s.blocks += self.pool.allocate(1)
                count += 1
                tokens += 1
            work.draft = work.guess[:count]


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn


def step_batch(works: Rows[Work], block_size: int) -> StepBatch:
    """The arrays of a planned step. Rows of logits follow works: one for each draft token, and one more."""
    past = np.array([w.sequence.computed for w in works], np.int32)
    lengths = np.array([w.count + len(w.draft) for w in works], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    used = -(-(past + lengths) // block_size)
    table = np.zeros((len(works), used.max()), np.int32)
    tokens: list[Array] = []
    rows: list[Array] = [np.zeros(0, np.int64)]
    for i, (w, count) in enumerate(zip(works, used.tolist(), strict=True)):
        table[i, :count] = w.sequence.blocks[:count]
        tokens += [w.sequence.buffer[past[i] : past[i] + w.count], w.draft]
        if w.ends:
            rows.append(np.arange(starts[i + 1] - 1 - len(w.draft), starts[i + 1], dtype=np.int64))
    return StepBatch(
        input_ids=np.concatenate(tokens),
        positions=np.arange(starts[-1], dtype=np.int64) + np.repeat(past - starts[:-1], lengths),
        query_starts=starts,
        past_lens=past,
        block_table=table,
        logit_rows=np.concatenate(rows),
    )
