"""Calibration error, and the bound of its rise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medcompile.errors import DataError
from medcompile.metrics import Predictions, evaluate
from medcompile.metrics.calibration import PairedCalibration, calibration_sample
from medcompile.metrics.judge import verdict
from medcompile.spec import Margin, Verdict


def plain(confidence: np.ndarray, right: np.ndarray) -> float:
    """The textbook's loop."""
    total = 0.0
    for b in range(15):
        mine = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14))
        if mine.any():
            total += mine.mean() * abs(confidence[mine].mean() - right[mine].mean())
    return total


def drawn(
    rng: np.random.Generator, rise: float, before: float = 0.05, items: int = 1_000, noise: float = 0.02
) -> PairedCalibration:
    """Two models that say `before` and `before + rise` more than they know, so that this is their true error."""
    sure = 0.5 + 0.4 * rng.random(items)
    other = np.clip(sure + noise * rng.normal(size=items), 0, 0.9)
    fate = rng.random(items)
    said = (sure + before, other + before + rise)
    return calibration_sample(said, (fate < sure, fate < other), np.arange(items), resamples=1_000)


def test_the_errors_shown_are_the_textbooks() -> None:
    rng = np.random.default_rng(0)
    said, other, fate = rng.random(400), rng.random(400), rng.random(400)
    right = (fate < said, fate < 0.3)
    sample = calibration_sample((said, other), right, np.arange(400))
    assert sample.reference == pytest.approx(plain(said, right[0]))
    assert sample.value == pytest.approx(plain(other, right[1]))
    assert sample.difference == pytest.approx(sample.reference - sample.value)
    assert (sample.samples, sample.units) == (400, 400)


def test_equal_models_have_a_bound_of_three_events_below_zero() -> None:
    same = drawn(np.random.default_rng(1), 0.0, noise=0.0)
    below, above = same.widths(0.05)
    assert same.difference == 0.0
    assert below == pytest.approx(3 / 1_000, rel=0.01)
    assert above > 0.0


def test_the_bounds_hold_the_difference_and_widen_with_the_confidence() -> None:
    sample = drawn(np.random.default_rng(2), 0.02)
    widths = [sample.widths(level) for level in (1e-6, 0.001, 0.05, 0.5)]
    assert all(below >= 0 and above >= 0 for below, above in widths)
    assert [below for below, _ in widths] == sorted((below for below, _ in widths), reverse=True)


def test_a_rise_of_the_margin_is_rarely_called_none_where_the_plain_difference_hides_it() -> None:
    rng = np.random.default_rng(3)
    margin, hidden, false = Margin("ece", 0.02), 0, 0
    for _ in range(150):
        sample = drawn(rng, 0.02, before=0.0, items=400, noise=0.0)
        hidden += sample.difference > -0.01
        false += verdict(sample, margin)[0] is Verdict.NON_INFERIOR
    assert hidden / 150 > 0.5  # noise in each bin is larger than what it rises by
    assert false / 150 <= 0.05


def test_a_large_rise_is_shown_and_a_fall_is_not_held_against_the_candidate() -> None:
    rng = np.random.default_rng(4)
    assert verdict(drawn(rng, 0.09, items=20_000), Margin("ece", 0.02))[0] is Verdict.INFERIOR
    assert verdict(drawn(rng, -0.04, items=20_000), Margin("ece", 0.02))[0] is Verdict.NON_INFERIOR


def test_power_grows_with_items_and_margin() -> None:
    sample = drawn(np.random.default_rng(5), 0.0)
    few, many = (sample.power(0.02, 0.05, growth) for growth in (1.0, 30.0))
    assert few < many
    assert many > 0.9
    assert sample.power(0.001, 0.05) == 0.0


def test_words_and_images_have_a_calibration_error_and_old_answers_are_told() -> None:
    rng = np.random.default_rng(6)
    sentences = [rng.integers(0, 3, 20) for _ in range(60)]
    sure = [rng.uniform(0.4, 1.0, 20) for _ in sentences]
    answers, tags = Predictions(sentences, confidences=sure), ("O", "B-D", "I-D")
    found = evaluate("token-classification", [Margin("ece", 0.2)], answers, answers, sentences, None, tags)[0]
    assert (found.samples, found.units) == (1_200, 60)
    assert found.value == pytest.approx(plain(np.concatenate(sure), np.ones(1_200, bool)))

    scores = rng.dirichlet(np.ones(3), 90)
    images = Predictions(rng.normal(size=(90, 8)), scores=scores)
    gold = np.arange(90) % 3
    found = evaluate("image", [Margin("ece", 0.2)], images, images, gold, None, ("a", "b", "c"))[0]
    assert found.value == pytest.approx(plain(scores.max(axis=1), scores.argmax(axis=1) == gold))

    old = replace(answers, confidences=None)
    with pytest.raises(DataError, match="confidences"):
        evaluate("token-classification", [Margin("ece", 0.2)], old, answers, sentences, None, tags)
    assert "ece" not in {e.metric for e in evaluate("token-classification", (), old, answers, sentences, None, tags)}


def test_confidences_of_other_words_are_refused() -> None:
    sentence = [np.array([0, 1])]
    wrong = Predictions(sentence, confidences=[np.array([0.5])])
    with pytest.raises(DataError, match="one for each word"):
        evaluate("token-classification", (), wrong, wrong, sentence, None, ("O", "B-D"))
