from __future__ import annotations

import random

import numpy as np

from medcompile.runtime.generator import Generator
from medcompile.runtime.prompts import DecoderText
from medcompile.runtime.sampling import Sampling
from medcompile.runtime.speculation import Lookup
from tests.runtime.fake_decoder import FakeDecoder, letters


def test_a_guess_is_what_followed_the_longest_run_that_stood_there_before() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 7, 1, 2, 3, 4])
    assert Lookup(3).guess(tokens, 10).tolist() == [5, 6, 9]  # after 1 2 3 4, not what followed the later 3 4
    assert Lookup(3).guess(tokens[2:], 10).tolist() == [7, 7, 1]  # 3 4 alone stood there twice: the later one counts


def test_a_guess_in_a_loop_goes_round() -> None:
    assert Lookup(8).guess(np.array([9, 1, 2, 1, 2, 1, 2]), 10).tolist() == [1, 2, 1, 2, 1, 2, 1, 2]


def test_there_is_no_guess_without_a_match_or_room() -> None:
    assert Lookup(8).guess(np.arange(10), 10).tolist() == []
    assert Lookup(8).guess(np.array([1, 2, 1, 2]), 0).tolist() == []
    assert Lookup(8).guess(np.array([1]), 5).tolist() == []


def test_an_index_that_grows_with_its_text_guesses_as_one_made_at_once() -> None:
    rnd = random.Random(0)
    tokens = np.array([rnd.randrange(4) for _ in range(200)])
    growing = Lookup(5)
    for end in range(1, 200, 3):
        assert growing.guess(tokens[:end], 9).tolist() == Lookup(5).guess(tokens[:end], 9).tolist()


def test_the_chance_follows_what_guesses_were_worth_checked_or_not() -> None:
    lookup = Lookup(4)
    for _ in range(20):
        lookup.learn(np.array([1, 2, 3]), np.array([1, 2, 3, 8]))
    assert lookup.chance > 0.99
    for _ in range(20):
        lookup.learn(np.array([1, 2, 3]), np.array([7]))
    assert lookup.chance < 0.05


def generator(guess: int, *, repeats: int, **how: int) -> tuple[FakeDecoder, Generator]:
    model = FakeDecoder(blocks=200, repeats=repeats)
    return model, Generator(model, DecoderText(letters(), 300, ()), guess=guess, **how)


def test_a_text_that_repeats_itself_takes_fewer_steps_and_gives_the_same_tokens() -> None:
    for sampling in (Sampling(max_tokens=60), Sampling(max_tokens=60, temperature=0.2, seed=3)):
        plain_model, plain = generator(0, repeats=10)
        guessing_model, guessing = generator(8, repeats=10)
        prompts = [[1, 2, 3, 4, i] for i in range(3)]
        for prompt in prompts:
            assert plain.generate([prompt], sampling) == guessing.generate([prompt], sampling)
        assert len(guessing_model.batches) < 0.6 * len(plain_model.batches)


def test_wrong_guesses_in_full_steps_are_soon_given_up() -> None:
    prompts = [[i, 1, 2, 3, 4, 1, 2, 3] for i in range(8)]
    model, guessing = generator(8, repeats=0)
    guessing.generate(prompts, Sampling(max_tokens=100))
    stats = guessing.stats
    assert stats.guessed < 0.1 * stats.generated  # a step of eight is dear, and no guess came true
    assert model.computed_tokens < 1.1 * stats.computed


def test_guesses_take_no_more_tokens_than_a_step_may_hold_and_none_beyond_the_answers_end() -> None:
    model, guessing = generator(8, repeats=10, step_tokens=6, requests=4)
    answers = guessing.generate([[1, 2, 3, i] for i in range(4)], Sampling(max_tokens=30))
    assert all(len(a.token_ids) == 30 for a in answers)
    assert max(len(b.input_ids) for b in model.batches) <= 6
    assert max(int(b.positions.max()) for b in model.batches) <= 4 + 30 - 2
