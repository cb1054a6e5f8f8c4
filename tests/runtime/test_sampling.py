from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medcompile.errors import BackendError, UsageError
from medcompile.runtime.sampling import Row, Sampling, choose, kept, logprob, penalize, uniform

Array = np.ndarray[Any, Any]

PROMPT, ANSWER = [3, 5, 5, 9], [7, 7, 3, 11]
HISTORY = np.array(PROMPT + ANSWER)


def logits(rows: int, vocabulary: int = 500, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * 3).astype(np.float32)


def row(sampling: Sampling, seed: int = 0, history: Array = HISTORY, allowed: Array | None = None) -> Row:
    return Row(sampling, seed, history, len(PROMPT), allowed)


def scattered(row_logits: Array, sampling: Sampling) -> Array:
    """The distribution that a draw is made from, float64 [vocabulary]."""
    ids, weights = kept(row_logits, sampling)
    found = np.zeros(len(row_logits))
    found[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return found


def by_transformers(row_logits: Array, *processors: Any) -> Array:
    torch = pytest.importorskip("torch")
    scores = torch.tensor(row_logits)[None]
    for processor in processors:
        scores = processor(torch.tensor(HISTORY)[None], scores)
    return np.asarray(torch.softmax(scores.double(), -1)[0].numpy())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(40, 0.9, 0.05), (0, 0.7, 0), (7, 1, 0), (0, 1, 0.1), (0, 0.99, 0)]
)
def test_temperature_top_k_top_p_and_min_p_leave_the_distribution_that_transformers_leaves(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    theirs = pytest.importorskip("transformers.generation.logits_process")
    processors = [theirs.TemperatureLogitsWarper(temperature)]
    processors += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    processors += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    for one in logits(20):
        ours = scattered(one, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
        np.testing.assert_allclose(ours, by_transformers(one, *processors), atol=2e-6)


def test_repetition_penalty_changes_logits_as_transformers_does() -> None:
    theirs = pytest.importorskip("transformers.generation.logits_process")
    torch = pytest.importorskip("torch")
    for one in logits(5):
        expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(HISTORY)[None], torch.tensor(one)[None])[0]
        np.testing.assert_allclose(penalize(one, row(Sampling(repetition_penalty=1.3))), expected.numpy(), rtol=1e-6)


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    (one,) = logits(1)
    change = one - penalize(one, row(Sampling(presence_penalty=0.5, frequency_penalty=0.25)))
    expected = np.zeros(len(one))
    expected[7] = 0.5 + 2 * 0.25
    expected[[3, 11]] = 0.5 + 0.25  # 3 stands in the prompt too, which does not count
    np.testing.assert_allclose(change, expected, atol=1e-6)


def test_draws_follow_the_distribution_they_are_made_from() -> None:
    (one,) = logits(1, vocabulary=150)  # more than one chunk
    sampling = Sampling(temperature=1.5)
    draws = 20_000
    rows = [row(sampling, seed) for seed in range(draws)]
    tokens = np.concatenate([choose(np.tile(one, (1000, 1)), rows[i : i + 1000]) for i in range(0, draws, 1000)])
    found = np.bincount(tokens, minlength=len(one))
    expected = draws * scattered(one, sampling)
    common = expected > 5
    chi_square = ((found - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_numbers_of_neighbouring_seeds_and_positions_are_spread_evenly_and_unrelated() -> None:
    numbers = np.array([[uniform(seed, position) for position in range(100)] for seed in range(100)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert abs(counts - 500).max() < 110  # five standard deviations
    for a, b in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05


def test_a_row_is_chosen_alike_alone_and_among_others() -> None:
    batch = logits(6)
    samplings = [
        Sampling(),
        Sampling(temperature=1),
        Sampling(temperature=0.5, top_p=0.8),
        Sampling(repetition_penalty=2),
        Sampling(temperature=2, top_k=10),
        Sampling(temperature=1, min_p=0.2, frequency_penalty=1),
    ]
    rows = [row(s, seed) for seed, s in enumerate(samplings)]
    together = choose(batch, rows)
    assert together.tolist() == [int(choose(batch[i : i + 1], rows[i : i + 1])[0]) for i in range(6)]
    order = [4, 2, 0, 5, 3, 1]
    assert choose(batch[order], [rows[i] for i in order]).tolist() == together[order].tolist()


def test_choosing_leaves_the_models_logits_as_they_are() -> None:
    batch = logits(2)
    before = batch.copy()
    choose(batch, [row(Sampling(repetition_penalty=2, frequency_penalty=1)), row(Sampling(temperature=1, top_p=0.5))])
    np.testing.assert_array_equal(batch, before)


def test_a_forbidden_token_is_never_chosen() -> None:
    (one,) = logits(1)
    allowed = np.zeros(len(one), np.bool_)
    allowed[[4, 444]] = True
    for sampling in (Sampling(), Sampling(temperature=5), Sampling(temperature=5, top_k=3, top_p=0.999)):
        assert {int(choose(one[None], [row(sampling, seed, allowed=allowed)])[0]) for seed in range(40)} <= {4, 444}


def test_tokens_as_probable_as_the_last_of_top_k_stay_and_top_p_takes_the_first_of_equals() -> None:
    even = np.zeros(200, np.float32)
    ids, _ = kept(even, Sampling(temperature=1, top_k=3))
    assert ids is not None
    assert len(ids) == 200
    ids, _ = kept(even, Sampling(temperature=1, top_p=0.25))
    assert ids is not None
    assert ids.tolist() == list(range(50))


def test_the_most_probable_token_alone_is_left_by_a_tiny_share_or_temperature() -> None:
    for one in logits(20):
        for sampling in (
            Sampling(temperature=1, top_p=1e-9),
            Sampling(temperature=1e-6),
            Sampling(temperature=1, min_p=1),
        ):
            assert choose(one[None], [row(sampling, 5)])[0] == one.argmax()


def test_logprobs_are_the_models_own_and_name_the_most_probable_tokens_in_order() -> None:
    (one,) = logits(1)
    expected = one.astype(np.float64) - np.log(np.exp(one.astype(np.float64)).sum())
    found = logprob(one, 17, 5)
    assert found.token_id == 17
    assert found.logprob == pytest.approx(expected[17], abs=1e-5)
    assert [i for i, _ in found.top] == np.argsort(-one)[:5].tolist()
    assert [p for _, p in found.top] == pytest.approx(np.sort(expected)[::-1][:5].tolist(), abs=1e-5)
    assert logprob(one, 17, 0).top == ()


def test_nan_logits_are_an_error_and_not_a_token() -> None:
    batch = logits(2)
    batch[1, 9] = np.nan
    with pytest.raises(BackendError, match="NaN"):
        choose(batch, [row(Sampling()), row(Sampling())])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": None},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"seed": -5},
        {"stop": ("",)},
    ],
)
def test_settings_that_mean_nothing_are_refused_with_what_to_give_instead(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        Sampling(**wrong)
    assert error.value.fix
