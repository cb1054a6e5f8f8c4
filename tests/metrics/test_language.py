"""The metrics of language models, on numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medcompile.errors import DataError
from medcompile.metrics import Predictions, evaluate
from medcompile.metrics.language import BROKEN, LIKELIEST
from medcompile.spec import Evidence, Margin, Verdict

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(5, 60, 80)
LOGS = [-RNG.gamma(2.0, 1.2, n) for n in LENGTHS]
PLACES = np.arange(0, LENGTHS.sum(), 3)


def distributions(logits: Array) -> Array:
    found: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


LOGITS = RNG.normal(0, 2, (len(PLACES), 9))
IDS = np.tile(np.arange(9), (len(PLACES), 1))


def said(logs: list[Array], logits: Array = LOGITS, **other: Any) -> Predictions:
    top1 = np.arange(LENGTHS.sum()) % 7
    made = {"top1": top1, "positions": PLACES, "kept_ids": IDS, "kept_logs": distributions(logits)}
    return Predictions(logs, **(made | other))


def evidence(metric: str, candidate: Predictions, max_drop: float = 0.01, **given: Any) -> Evidence:
    return evaluate("generate", [Margin(metric, max_drop, 0.95)], said(LOGS), candidate, **given)[0]


def test_perplexity_is_that_of_all_tokens_and_its_rise_is_judged_as_a_share() -> None:
    worse = [v - 0.02 for v in LOGS]
    found = evidence("perplexity", said(worse))
    assert found.reference == pytest.approx(np.exp(-np.concatenate(LOGS).mean()))
    assert found.value == pytest.approx(found.reference * np.exp(0.02))
    assert found.difference == pytest.approx(1 - np.exp(0.02))
    assert found.verdict is Verdict.INFERIOR
    assert evidence("perplexity", said(worse), max_drop=0.03).verdict is Verdict.NON_INFERIOR


def test_a_lower_perplexity_is_a_gain() -> None:
    found = evidence("perplexity", said([v + 0.02 for v in LOGS]))
    assert found.difference == pytest.approx(1 - np.exp(-0.02))
    assert found.verdict is Verdict.NON_INFERIOR


def test_noise_that_outweighs_the_margin_is_inconclusive_and_pairing_tames_it() -> None:
    noisy = [v + RNG.normal(0, 1.0, len(v)) for v in LOGS]
    calm = [v + RNG.normal(0, 0.02, len(v)) for v in LOGS]
    assert evidence("perplexity", said(noisy), max_drop=0.001).verdict is not Verdict.NON_INFERIOR
    found = evidence("perplexity", said(calm))
    assert found.verdict is Verdict.NON_INFERIOR
    assert found.power is not None and found.power > 0.9


def test_texts_of_one_document_are_one_unit_and_widen_the_interval() -> None:
    shift = np.repeat([0.03, -0.03], 40)
    moved = [v + s for v, s in zip(LOGS, shift, strict=True)]
    alone = evidence("perplexity", said(moved))
    together = evidence("perplexity", said(moved), units=[f"d{i // 10}" for i in range(80)])
    assert (alone.units, together.units, together.unit) == (80, 8, "document")
    assert together.interval[1] - together.interval[0] > 1.5 * (alone.interval[1] - alone.interval[0])


def test_one_document_alone_proves_nothing() -> None:
    assert evidence("perplexity", said(LOGS), units=["d"] * 80).verdict is Verdict.INCONCLUSIVE


def test_divergence_is_exact_where_all_tokens_are_kept() -> None:
    other = LOGITS + RNG.normal(0, 0.5, LOGITS.shape)
    p, q = distributions(LOGITS), distributions(other)
    exact = (np.exp(p) * (p - q)).sum(axis=1).mean()
    found = evidence("kl", said(LOGS, other), max_drop=1.0)
    assert found.value == pytest.approx(exact)
    assert found.reference == 0
    assert found.difference == pytest.approx(-exact)
    assert found.samples == len(PLACES)


def test_divergence_of_many_tokens_is_that_of_the_likeliest_and_an_estimate_of_the_others() -> None:
    logits = RNG.normal(0, 1, (len(PLACES), LIKELIEST + 200))
    p, q = distributions(logits), distributions(logits + RNG.normal(0, 0.3, logits.shape))
    ids = np.argsort(-p, axis=1)
    others = ids[:, LIKELIEST:]
    likely = np.exp(np.take_along_axis(p, others, axis=1))
    drawn = np.stack([
        RNG.choice(row, 16, p=chance / chance.sum()) for row, chance in zip(others, likely, strict=True)
    ])  # fmt: skip
    kept = np.concatenate([ids[:, :LIKELIEST], drawn], axis=1)
    pair = {
        name: said(LOGS, kept_ids=kept, kept_logs=np.take_along_axis(full, kept, axis=1))
        for name, full in (("reference", p), ("candidate", q))
    }
    found = evaluate("generate", [Margin("kl", 1.0, 0.95)], pair["reference"], pair["candidate"])[0]
    exact = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert -found.interval[1] < exact < -found.interval[0]
    assert found.value == pytest.approx(exact, rel=0.1)


def test_the_reference_itself_diverges_by_nothing_and_passes() -> None:
    found = evidence("kl", said(LOGS), max_drop=0.001)
    assert (found.value, found.verdict) == (0, Verdict.NON_INFERIOR)


def test_agreement_counts_tokens_and_one_without_a_likeliest_agrees_with_none() -> None:
    top1 = np.arange(LENGTHS.sum()) % 7
    top1[:10] = -1
    found = evidence("top1_agreement", said(LOGS, top1=top1), max_drop=0.1)
    assert found.value == pytest.approx(1 - 10 / LENGTHS.sum())
    assert found.samples == LENGTHS.sum()


def test_choices_are_right_where_their_likelihood_is_highest() -> None:
    gold = np.arange(80) % 3
    scores = np.where(np.arange(3) == gold[:, None], -1.0, -2.0)
    wrong = scores.copy()
    wrong[:8] = wrong[:8, ::-1]  # right for those of the middle class still
    found = evaluate(
        "generate",
        [Margin("accuracy", 0.2, 0.95)],
        said(LOGS, scores=scores),
        said(LOGS, scores=wrong),
        gold,
        labels=["maybe", "no", "yes"],
    )
    by_name = {e.metric: e for e in found}
    assert by_name["accuracy"].reference == 1
    assert by_name["accuracy"].value == pytest.approx(1 - 5 / 80)
    assert by_name["accuracy[no]"].value == 1


def test_a_model_that_gives_nan_is_inferior_by_every_margin_and_has_finite_numbers() -> None:
    broken = [v.copy() for v in LOGS]
    broken[3][2] = np.nan
    margins = [Margin(name, 0.5, 0.95) for name in ("perplexity", "kl", "top1_agreement")]
    logits = LOGITS.copy()
    logits[5] = np.nan
    found = evaluate("generate", margins, said(LOGS), said(broken, logits))
    assert [e.verdict for e in found] == [Verdict.INFERIOR] * 3
    assert all(np.isfinite([e.value, e.difference, e.lower]).all() for e in found)
    assert np.concatenate(LOGS).min() > BROKEN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kept_ids": IDS[:, ::-1]}, "kept_ids"),
        ({"positions": PLACES + 1}, "positions"),
        ({"top1": None}, "top1"),
    ],
)
def test_answers_about_other_tokens_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        evidence("perplexity", said(LOGS, **change))


def test_texts_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="item 0 has"):
        evidence("perplexity", said([LOGS[0][:-1], *LOGS[1:]]))
