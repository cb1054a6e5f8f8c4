"""Thousands of random schedules: whatever joins, leaves, is preempted, guessed or cached, every answer is the same.

The fake model itself checks that nothing is read before it was written, or written by another sequence.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from medcompile.runtime.generator import Generator
from medcompile.runtime.prompts import DecoderText
from medcompile.runtime.request import Request
from medcompile.runtime.sampling import Row, Sampling, choose
from tests.runtime.fake_decoder import FakeDecoder, letters

VOCABULARY = 24
END = 23
TOKENIZER = letters(VOCABULARY)
MODEL = FakeDecoder(vocabulary=VOCABULARY)
STEMS = [[random.Random(i).randrange(END) for _ in range(16)] for i in range(3)]
SAMPLINGS = (
    Sampling(),
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=2),
    Sampling(repetition_penalty=1.5, frequency_penalty=0.2),
)
LIMIT = 400  # steps in which any of these schedules must be through


@cache
def alone(prompt: tuple[int, ...], kind: int, count: int) -> tuple[int, ...]:
    """The answer by definition: one token after another, each from the logits of all before it."""
    sampling = SAMPLINGS[kind]
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != END):
        row = Row(sampling, sampling.seed or 0, np.array(tokens), len(prompt))
        tokens.append(int(choose(MODEL.logits(tokens)[None], [row])[0]))
    return tuple(tokens[len(prompt) :])


def check_books(generator: Generator, slots: int) -> None:
    """No block lost, none owned twice, none open to writing that others see or may find."""
    scheduler = generator._scheduler
    pool = scheduler.pool
    held = Counter(b for s in scheduler.running for b in s.blocks)
    held.update(s.copy[0] for s in scheduler.running if s.copy)
    assert {b: pool.owners(b) for b in range(pool.blocks) if pool.owners(b)} == dict(held)
    idle = [*pool._blank, *pool._cached]
    assert sorted([*idle, *held]) == list(range(pool.blocks))
    assert all(pool.published(b) for b in pool._cached)
    assert not any(pool.published(b) for b in pool._blank)
    assert pool._by_hash == {h: b for b, h in enumerate(pool._hash) if h is not None}
    for s in scheduler.running:
        assert 0 <= s.computed < s.length <= len(s.buffer)
        assert s.published == s.computed // pool.block_size <= len(s.blocks)
        assert all(pool.owners(b) == 1 and not pool.published(b) for b in s.blocks[s.published :])
    assert not any(s.blocks or s.copy or s.computed for s in scheduler.waiting)
    assert len(scheduler.running) <= slots
    for queue in (scheduler.running, scheduler.waiting):
        assert [s.turn for s in queue] == sorted(s.turn for s in queue)


def make(blocks: int, block_size: int, step_tokens: int, slots: int, guess: int) -> tuple[FakeDecoder, Generator]:
    model = FakeDecoder(blocks=blocks, block_size=block_size, vocabulary=VOCABULARY)
    text = DecoderText(TOKENIZER, 40, (END,))
    return model, Generator(model, text, step_tokens=step_tokens, requests=slots, guess=guess, ageing=5)


def prompt_of(rnd: random.Random) -> tuple[int, ...]:
    """Many have a stem in common, some wholly, some up to a full block."""
    tail = [rnd.randrange(END) for _ in range(rnd.choice([0, 0, 1, 3]))]
    return tuple(rnd.choice(STEMS)[: rnd.randint(1, 16)] + tail)


def run_schedule(seed: int, seen: Counter[str]) -> None:
    rnd = random.Random(seed)
    block_size = rnd.choice([1, 2, 4])
    blocks = rnd.randint(-(-28 // block_size), 60 // block_size)
    slots = rnd.randint(1, 5)
    model, generator = make(blocks, block_size, rnd.randint(slots, 14), slots, rnd.choice([0, 2, 6]))
    live: list[tuple[Request, tuple[int, ...]]] = []
    to_come = rnd.randint(2, 7)
    for _ in range(LIMIT):
        while to_come and rnd.random() < 0.5:
            to_come -= 1
            prompt, kind, count = prompt_of(rnd), rnd.randrange(len(SAMPLINGS)), rnd.randint(1, 9)
            sampling = Sampling(**{**SAMPLINGS[kind].__dict__, "max_tokens": count})
            salt = rnd.choice(["", "", "other"])
            request = generator.submit(list(prompt), sampling, priority=rnd.choice([0, 0, 1, 2]), cache_salt=salt)
            live.append((request, alone(prompt, kind, count)))
        if live and rnd.random() < 0.04:
            request, _ = live.pop(rnd.randrange(len(live)))
            before = generator.stats.free_blocks
            exclusive = [b for b in request.sequence.blocks if generator._scheduler.pool.owners(b) == 1]
            generator.cancel(request)
            seen["cancelled"] += 1
            assert generator.stats.free_blocks - before >= len(exclusive)
        check_books(generator, slots)
        if not generator.step() and not to_come:
            break
        check_books(generator, slots)
    else:
        pytest.fail(f"schedule {seed} is not through after {LIMIT} steps")
    for request, expected in live:
        if request.finish_reason != "cancelled":
            assert request.completion().token_ids == expected, f"schedule {seed}"
    stats = generator.stats
    assert stats.free_blocks == blocks
    seen["preempted"] += stats.preemptions
    seen["cached"] += stats.cached
    seen["guessed"] += stats.guessed
    seen["accepted"] += stats.accepted
    seen["chunked"] += sum(len(b.logit_rows) < len(b.past_lens) for b in model.batches)


def check_schedules(first: int, count: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(first, first + count):
        run_schedule(seed, seen)
    return seen


def test_every_answer_of_a_thousand_random_schedules_is_that_of_its_prompt_alone() -> None:
    seen = check_schedules(0, 1000)
    # The schedules are worth something only if all of this happened, and often.
    for what in ("cancelled", "preempted", "cached", "guessed", "accepted", "chunked"):
        assert seen[what] > 100, (what, seen)


@pytest.mark.slow
def test_every_answer_of_five_thousand_more_random_schedules_is_that_of_its_prompt_alone() -> None:
    check_schedules(1000, 5000)


class AnySchedule(RuleBasedStateMachine):
    """Hypothesis looks for the schedule that breaks an invariant, and shrinks it."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]), slots=st.integers(1, 4), extra=st.integers(0, 8), guess=st.integers(0, 4)
    )
    def start(self, block_size: int, slots: int, extra: int, guess: int) -> None:
        self.slots = slots
        self.generator = make(-(-24 // block_size) + extra, block_size, slots + extra, slots, guess)[1]
        self.live: list[tuple[Request, tuple[int, ...]]] = []

    @rule(
        stem=st.sampled_from(STEMS),
        length=st.integers(1, 16),
        count=st.integers(1, 8),
        kind=st.integers(0, len(SAMPLINGS) - 1),
        priority=st.integers(0, 2),
    )
    def submit(self, stem: list[int], length: int, count: int, kind: int, priority: int) -> None:
        sampling = Sampling(**{**SAMPLINGS[kind].__dict__, "max_tokens": count})
        request = self.generator.submit(stem[:length], sampling, priority=priority)
        self.live.append((request, alone(tuple(stem[:length]), kind, count)))

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.generator.step()
            check_books(self.generator, self.slots)

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.live:
            self.generator.cancel(self.live.pop(which % len(self.live))[0])

    @invariant()
    def books_are_in_order(self) -> None:
        if hasattr(self, "generator"):
            check_books(self.generator, self.slots)

    def teardown(self) -> None:
        if not hasattr(self, "generator"):
            return
        steps = 0
        while self.generator.step():
            steps += 1
            assert steps < LIMIT
        for request, expected in self.live:
            assert request.completion().token_ids == expected
        assert self.generator.stats.free_blocks == self.generator.stats.blocks


TestAnySchedule = AnySchedule.TestCase
TestAnySchedule.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
