"""The metrics of image and text towers, and what all tasks share with them: metrics of one label, the worst cosine."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from seqeval.metrics import classification_report

from medcompile.errors import DataError, UsageError
from medcompile.metrics import Predictions, check_names, evaluate, is_metric, metric_names, partner_ranks
from medcompile.metrics.intervals import NORMAL, resampled_totals
from medcompile.metrics.judge import verdict
from medcompile.metrics.material import Material
from medcompile.metrics.pairs import auroc_sample
from medcompile.metrics.tasks import METRICS
from medcompile.spec import Evidence, Margin, Verdict

CLASSES = ("Effusion", "Normal", "Pneumonia")
ENTITIES = ["O", "B-Disease", "I-Disease", "B-Drug", "I-Drug"]
TASKS = ["image", "text"]


def by_name(evidence: tuple[Evidence, ...]) -> dict[str, Evidence]:
    return {e.metric: e for e in evidence}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def pair(n: int, noise: float, task: str = "image", seed: int = 0) -> tuple[Predictions, Predictions, np.ndarray]:
    """n images of three classes with captions, as the reference and a noisy candidate answer them."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 3, n)
    logits = rng.normal(size=(n, 3)) + 2.5 * np.eye(3)[gold]
    images = rng.normal(size=(n, 16))
    texts = images + 0.7 * rng.normal(size=(n, 16))

    def answers(logits: np.ndarray, images: np.ndarray, texts: np.ndarray) -> Predictions:
        values = images if task == "image" else np.concatenate([texts, np.eye(16)[:7]])
        ranks = partner_ranks(images, texts), partner_ranks(texts, images)
        return Predictions(values.astype(np.float32), None, softmax(logits), *ranks)

    moved = [a + noise * rng.normal(size=a.shape) for a in (logits, images, texts)]
    return answers(logits, images, texts), answers(*moved), gold


def area(scores: np.ndarray, mine: np.ndarray) -> float:
    beaten = scores[mine][:, None] - scores[~mine][None, :]
    return float((beaten > 0).mean() + (beaten == 0).mean() / 2)


@pytest.mark.parametrize("task", TASKS)
def test_zero_shot_metrics_are_what_their_names_say(task: str) -> None:
    reference, candidate, gold = pair(300, 0.3, task)
    found = by_name(evaluate(task, [Margin("auroc", 0.05)], reference, candidate, gold, labels=CLASSES))
    for model, scores in (("reference", reference.scores), ("value", candidate.scores)):
        assert scores is not None
        right = scores.argmax(axis=1) == gold
        areas = [area(scores[:, k], gold == k) for k in range(3)]
        assert getattr(found["accuracy"], model) == pytest.approx(right.mean())
        assert getattr(found["auroc"], model) == pytest.approx(np.mean(areas))
        for k, label in enumerate(CLASSES):
            assert getattr(found[f"accuracy[{label}]"], model) == pytest.approx(right[gold == k].mean())
            assert getattr(found[f"auroc[{label}]"], model) == pytest.approx(areas[k])
    assert found["accuracy[Normal]"].samples == (gold == 1).sum()
    same = reference.scores.argmax(axis=1) == candidate.scores.argmax(axis=1)
    assert found["agreement"].value == same.mean()
    assert found["auroc"].discordant == (~same).sum()
    assert found["auroc"].verdict is Verdict.NON_INFERIOR
    assert found["auroc"].unit == found["accuracy"].unit == "image"


def test_a_task_reports_all_that_its_material_tells() -> None:
    reference, candidate, gold = pair(60, 0.1)
    found = by_name(evaluate("image", (), reference, candidate, gold, labels=CLASSES))
    of_labels = [f"{metric}[{label}]" for metric in ("accuracy", "auroc") for label in CLASSES]
    recalls = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]
    plain = {"accuracy", "auroc", "agreement", "harmful_flips", "ece", "cosine", "cosine_worst"}
    assert set(found) == {*plain, *of_labels, *recalls}
    assert {e.verdict for e in found.values()} == {None}
    alone = evaluate("image", (), Predictions(reference.values), Predictions(candidate.values))
    assert [e.metric for e in alone] == ["cosine", "cosine_worst"]


def test_many_labels_are_reported_by_their_mean_alone() -> None:
    reference, candidate, gold = pair(60, 0.1)
    wide = [np.concatenate([p.scores, np.zeros((60, 10), np.float32)], axis=1) for p in (reference, candidate)]
    labels = [*CLASSES, *(f"class {i}" for i in range(10))]
    reference, candidate = (replace(p, scores=s) for p, s in zip((reference, candidate), wide, strict=True))
    margins = [Margin("auroc[Normal]", 0.1)]
    found = by_name(evaluate("image", margins, reference, candidate, gold, labels=labels))
    assert [name for name in found if "[" in name] == ["auroc[Normal]"]
    assert found["auroc"].value == pytest.approx(np.mean([area(wide[1][:, k], gold == k) for k in range(3)]))


def test_two_classes_have_one_auroc() -> None:
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 2, 200)
    likely = 1 / (1 + np.exp(-rng.normal(size=200) - 2 * gold))
    scores = Predictions(np.ones((200, 2)), None, np.stack([1 - likely, likely], axis=1))
    found = by_name(evaluate("image", (), scores, scores, gold, labels=("no", "yes")))
    plain = area(likely, gold == 1)
    for name in ("auroc", "auroc[no]", "auroc[yes]"):
        assert found[name].value == pytest.approx(plain)


def test_auroc_varies_over_resamples_as_delong_says() -> None:
    rng = np.random.default_rng(2)
    mine = rng.random(400) < 0.3
    reference = rng.normal(size=400) + 1.5 * mine
    candidate = reference + 0.8 * rng.normal(size=400)
    placed = []
    for scores in (reference, candidate):
        wins = scores[mine][:, None] > scores[~mine][None, :]
        placed.append((wins.mean(axis=1), wins.mean(axis=0)))
    of_side = [placed[1][side] - placed[0][side] for side in (0, 1)]
    delong = math.sqrt(sum(side.var(ddof=1) / len(side) for side in of_side))

    both = [np.stack([-s, s], axis=1) for s in (reference, candidate)]
    sample = auroc_sample(both[0], both[1], mine.astype(int), np.array([0, 1]), np.arange(400))
    assert sample.value - sample.reference == pytest.approx(of_side[0].mean())
    totals = resampled_totals(sample.totals.rows, 4_000)
    common, first, second = np.split(totals, 3, axis=1)
    spread = (sample.score(common, second) - sample.score(common, first)).std()
    assert spread == pytest.approx(delong, rel=0.06)
    assert sample.widths(0.05)[0] > 1.645 * delong


def test_auroc_without_any_change_is_bounded_by_the_smaller_side() -> None:
    gold = np.repeat([0, 1], [400, 100])
    likely = np.where(gold == 1, 0.8, 0.2)
    same = Predictions(np.ones((500, 2)), None, np.stack([1 - likely, likely], axis=1))
    documents = [i // 5 for i in range(500)]
    for margin, outcome in ((0.05, Verdict.NON_INFERIOR), (0.02, Verdict.INCONCLUSIVE)):
        first = evaluate("image", [Margin("auroc", margin)], same, same, gold, labels=("no", "yes"))[0]
        assert first.lower == pytest.approx(-3 / 100, rel=0.02)
        assert first.verdict is outcome
    clumped = evaluate("image", [Margin("auroc", 0.05)], same, same, gold, documents, ("no", "yes"))[0]
    assert clumped.lower < 1.5 * first.lower
    assert (clumped.units, clumped.unit) == (100, "document")


@pytest.mark.parametrize(("fall", "jitter"), [(True, 0.0), (True, 0.1), (False, 0.3)])
def test_auroc_is_falsely_non_inferior_in_at_most_five_per_cent(fall: bool, jitter: float) -> None:
    rng = np.random.default_rng(21)
    experiments, margin, whole = 200, 0.03, 0.92
    apart = NORMAL.inv_cdf(whole if fall else whole - margin) * math.sqrt(2 + 2 * jitter**2)  # area = Phi of it, scaled
    false = 0
    for _ in range(experiments):
        mine = rng.random(400) < 0.5
        common = rng.normal(size=400)
        reference = common + NORMAL.inv_cdf(whole) * math.sqrt(2) * mine
        candidate = common + jitter * rng.normal(size=400) + apart * mine
        if fall:
            candidate[mine & (rng.random(400) < margin / whole)] = -9.0
        both = [np.stack([-s, s], axis=1) for s in (reference, candidate)]
        sample = auroc_sample(both[0], both[1], mine.astype(int), np.array([0, 1]), np.arange(400), 500)
        false += verdict(sample, Margin("auroc", margin))[0] is Verdict.NON_INFERIOR
    assert false / experiments <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / experiments)


def test_auroc_needs_two_classes_and_counts_ties_half() -> None:
    reference, candidate, _ = pair(40, 0.1)
    with pytest.raises(DataError, match="images of two classes"):
        evaluate("image", [Margin("auroc", 0.1)], reference, candidate, np.zeros(40, int), labels=CLASSES)
    flat = replace(candidate, scores=np.full((40, 3), 1 / 3))
    found = by_name(evaluate("image", (), reference, flat, np.arange(40) % 3, labels=CLASSES))
    assert found["auroc"].value == 0.5


@pytest.mark.parametrize("task", TASKS)
def test_a_candidate_with_nan_is_inferior_by_every_margin(task: str) -> None:
    reference, _, gold = pair(2_000, 0.0, task)
    values, scores = reference.values.copy(), reference.scores.copy()
    values[5, 2] = scores[7, 1] = np.nan
    names = [n.replace("@k", "@5").replace("label", "Normal") for n in metric_names(task) if "worst:" not in n]
    margins = [Margin(name, 0.5) for name in names]
    for broken, told in ((replace(reference, values=values), 1), (replace(reference, scores=scores), 1),
                         (replace(reference, values=values, scores=scores), 2)):  # fmt: skip
        judged = evaluate(task, margins, reference, broken, gold, labels=CLASSES)[: len(margins)]
        assert {e.verdict for e in judged} == {Verdict.INFERIOR}
        assert judged[0].note == f"{told} answers hold NaN or Inf"
    found = by_name(evaluate(task, (), reference, replace(reference, scores=scores), gold, labels=CLASSES))
    assert found["agreement"].value == pytest.approx(1 - 1 / 2_000)
    assert found["auroc"].difference < -1 / 2_000


def test_a_partner_is_ranked_behind_all_that_are_as_similar() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    others = np.array([[1.0, 0.1], [1.0, 0.0], [2.0, 2.0], [5.0, 5.0]])
    assert partner_ranks(queries, others).tolist() == [1, 3, 1]
    rng = np.random.default_rng(3)
    queries = rng.normal(size=(50, 8))
    others = queries + rng.normal(size=(50, 8))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, others)]
    similar = unit[0] @ unit[1].T
    assert (partner_ranks(queries, others) == (similar > np.diag(similar)[:, None]).sum(axis=1)).all()


@pytest.mark.parametrize("broken", [0.0, np.nan, np.inf])
def test_a_broken_vector_finds_nothing_and_is_not_found(broken: float) -> None:
    queries = -np.eye(4) + 0.1
    others = queries.copy()
    others[2] = broken
    assert partner_ranks(queries, others).tolist() == [0, 0, 3, 0]
    assert partner_ranks(others, queries).tolist() == [0, 0, 4, 0]


def test_recall_counts_partners_among_the_first_k() -> None:
    reference, candidate, gold = pair(200, 0.5)
    names = ["image_to_text_recall@3", "text_to_image_recall@1"]
    found = evaluate("image", [Margin(n, 0.2) for n in names], reference, candidate, gold, labels=CLASSES)
    for evidence, ranks, k in zip(found, (candidate.image_to_text, candidate.text_to_image), (3, 1), strict=False):
        assert evidence.value == pytest.approx((ranks < k).mean())
        assert evidence.method.startswith("exact paired interval")


@pytest.mark.parametrize("task", ["embed", "image", "text"])
def test_the_worst_cosine_is_judged_by_what_was_seen(task: str) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(100, 16))
    moved = values.copy()
    moved[3] += 0.5 * rng.normal(size=16)
    for margin, outcome in ((0.5, Verdict.NON_INFERIOR), (0.001, Verdict.INFERIOR)):
        worst = evaluate(task, [Margin("cosine_worst", margin, 0.9)], Predictions(values), Predictions(moved))[0]
        expected = values[3] @ moved[3] / np.linalg.norm(values[3]) / np.linalg.norm(moved[3])
        assert worst.value == pytest.approx(expected)
        assert worst.lower == worst.difference == pytest.approx(expected - 1)
        assert worst.verdict is outcome
        assert worst.power is worst.samples_needed is None
        assert worst.note.startswith("with 90 % confidence, at most 2.3 % of such ")


def test_cosines_of_the_task_text_are_of_texts_and_its_classes_of_images() -> None:
    reference, candidate, gold = pair(90, 0.1, "text")
    units = [i // 3 for i in range(90)]
    found = by_name(evaluate("text", (), reference, candidate, gold, units, CLASSES))
    assert (found["cosine"].samples, found["cosine"].units, found["cosine"].unit) == (97, 97, "text")
    assert (found["accuracy"].samples, found["accuracy"].units, found["accuracy"].unit) == (90, 30, "document")
    texts_alone = Predictions(reference.values), Predictions(candidate.values)
    assert [e.metric for e in evaluate("text", (), *texts_alone)] == ["cosine", "cosine_worst"]
    assert [e.metric for e in evaluate("text", (), *texts_alone, None, [])] == ["cosine", "cosine_worst"]


@pytest.mark.parametrize(
    ("task", "names", "message", "hint"),
    [
        ("image", ["auroc[Pneumona]"], "there is no label 'Pneumona'", "did you mean Pneumonia"),
        ("image", ["accuracy[x]"], "there is no label 'x'", "the labels are Effusion, Normal, Pneumonia"),
        ("image", ["auroc", "aurok"], "no metric 'aurok'", "did you mean auroc"),
        ("image", ["cosine[Normal]"], "no metric", "image knows accuracy, accuracy[label]"),
    ],
)
def test_an_unknown_label_names_the_labels(task: str, names: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")) as caught:
        check_names(task, names, CLASSES)
    assert hint in caught.value.fix
    reference, candidate, gold = pair(9, 0.1)
    with pytest.raises(UsageError):
        evaluate(task, [Margin(n, 0.1) for n in names], reference, candidate, gold, labels=CLASSES)


def test_names_with_labels_are_metrics_whatever_the_label() -> None:
    for task, name in (
        ("image", "auroc[Pneumonia]"),
        ("text", "accuracy[a [b] @k]"),
        ("image", "text_to_image_recall@7"),
        ("token-classification", "recall[Disease]"),
        ("sequence-classification", "accuracy[yes]"),
    ):
        assert is_metric(task, name)
    for task, name in (
        ("image", "auroc[]"),
        ("image", "image_to_text_recall@k"),
        ("embed", "accuracy[a]"),
        ("sequence-classification", "auroc[yes]"),
        ("token-classification", "agreement[O]"),
    ):
        assert not is_metric(task, name)
    assert "auroc[label]" in metric_names("image")


def test_a_label_without_items_is_left_out_unless_a_margin_asks_for_it() -> None:
    reference, candidate, gold = pair(60, 0.1)
    gold = np.where(gold == 1, 0, gold)
    found = by_name(evaluate("image", (), reference, candidate, gold, labels=CLASSES))
    assert "accuracy[Pneumonia]" in found
    assert "accuracy[Normal]" not in found
    for metric in ("accuracy[Normal]", "auroc[Normal]"):
        with pytest.raises(DataError, match="no evaluation item has the label 'Normal'"):
            evaluate("image", [Margin(metric, 0.1)], reference, candidate, gold, labels=CLASSES)


@pytest.mark.parametrize(
    ("metric", "message"),
    [("accuracy", "needs gold labels"), ("agreement", "zero-shot scores"), ("image_to_text_recall@1", "with texts")],
)
def test_a_margin_on_what_the_data_lack_says_what_to_add(metric: str, message: str) -> None:
    values = Predictions(np.ones((4, 3)))
    with pytest.raises(DataError, match=message) as caught:
        evaluate("image", [Margin(metric, 0.1)], values, values)
    assert "evaluation.data" in caught.value.fix


def broken_scores(where: tuple[int, int]) -> np.ndarray:
    scores = np.full((6, 3), 1 / 3)
    scores[where] = np.nan
    return scores


@pytest.mark.parametrize(
    ("reference", "candidate", "gold", "message"),
    [
        ({"scores": np.ones((6, 3))}, {}, None, "only one of reference and candidate has scores"),
        ({"scores": np.ones((6, 2))}, {"scores": np.ones((6, 2))}, None, "6 images and 3 classes"),
        ({"scores": np.ones((6, 3))}, {"scores": np.ones((5, 3))}, None, r"\(5, 3\) \(candidate\)"),
        ({"scores": broken_scores((1, 2))}, {"scores": np.ones((6, 3))}, None, "reference's scores hold NaN"),
        ({"scores": np.ones((6, 3))}, {"scores": np.ones((6, 3))}, np.array([0, 1, 2, 3, 0, 0]), "label id 3"),
        ({"image_to_text": np.zeros(6, int)}, {}, None, "only one of reference and candidate has image_to_text"),
        ({"text_to_image": np.zeros(6, int)}, {"text_to_image": np.zeros(5, int)}, None, "one rank from 0 for each of"),
        ({"text_to_image": np.zeros(6, int)}, {"text_to_image": np.zeros(6)}, None, "one rank from 0"),
        ({"text_to_image": np.zeros(6, int)}, {"text_to_image": np.full(6, -1)}, None, "one rank from 0"),
        ({}, {}, np.zeros(5, int), "item counts differ"),
    ],
)
def test_answers_that_do_not_match_are_refused(reference: dict, candidate: dict, gold: object, message: str) -> None:
    values = np.ones((6, 4))
    with pytest.raises(DataError, match=message):
        evaluate("image", (), Predictions(values, **reference), Predictions(values, **candidate), gold, labels=CLASSES)


# ---- metrics of one label in the other tasks


def test_entity_scores_of_one_type_equal_seqeval() -> None:
    rng = np.random.default_rng(5)
    gold = [rng.integers(0, 5, 8) for _ in range(60)]
    candidate = [np.where(rng.random(8) < 0.3, rng.integers(0, 5, 8), s) for s in gold]
    evidence = evaluate(
        "token-classification",
        [Margin("recall[Disease]", 0.9)],
        Predictions(gold),
        Predictions(candidate),
        gold,
        labels=ENTITIES,
    )
    found = by_name(evidence)
    names = [[[ENTITIES[i] for i in s] for s in sentences] for sentences in (gold, candidate)]
    report = classification_report(*names, output_dict=True)
    for label in ("Disease", "Drug"):
        for metric, theirs in (("f1", "f1-score"), ("precision", "precision"), ("recall", "recall")):
            assert found[f"{metric}[{label}]"].value == pytest.approx(report[label][theirs])
    assert found["recall[Disease]"].samples == report["Disease"]["support"]
    assert found["recall[Disease]"].verdict is Verdict.NON_INFERIOR
    with pytest.raises(UsageError, match="no label 'B-Disease'") as caught:
        evaluate("token-classification", [Margin("f1[B-Disease]", 0.1)], Predictions(gold), Predictions(gold), gold,
                 labels=ENTITIES)  # fmt: skip
    assert "Disease" in caught.value.fix


def test_a_rare_type_is_bounded_by_its_entities_and_not_by_the_sentences() -> None:
    gold = [np.array([1, 0, 3 if i < 40 else 0]) for i in range(1_000)]
    same = Predictions(gold)
    found = by_name(evaluate("token-classification", (), same, same, gold, labels=ENTITIES))
    for metric in ("recall", "f1", "precision"):
        assert found[f"{metric}[Drug]"].lower == pytest.approx(-3 / 40, rel=0.05)
        assert found[f"{metric}[Disease]"].lower == pytest.approx(-3 / 1_000, rel=0.05)
    rare = [np.array([0, 0, 3 if i < 40 else 0]) for i in range(1_000)]
    found = by_name(evaluate("token-classification", (), Predictions(rare), Predictions(rare), rare, labels=ENTITIES))
    assert found["recall"].lower == pytest.approx(-3 / 40, rel=0.05)


def test_recall_of_a_rare_type_is_falsely_non_inferior_in_at_most_five_per_cent() -> None:
    rng = np.random.default_rng(6)
    experiments, false = 200, 0
    for _ in range(experiments):
        words = np.where(rng.random(200) < 0.3, 3, 0)
        lost = np.where(rng.random(200) < 0.06, 0, words)
        gold, candidate = [np.array([w]) for w in words], [np.array([w]) for w in lost]
        material = Material(
            "token-classification", Predictions(gold), Predictions(candidate), gold, np.arange(200), ENTITIES
        )
        sample = METRICS["token-classification"]["recall[label]"]("recall[Drug]", material)
        false += verdict(sample, Margin("recall[Drug]", 0.06))[0] is Verdict.NON_INFERIOR
    assert false / experiments <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / experiments)


def test_accuracy_of_one_class_is_over_its_items() -> None:
    gold = np.array([0, 0, 0, 1] * 100)
    candidate = gold.copy()
    candidate[:8] = 2
    units = [i // 4 for i in range(400)]
    found = by_name(
        evaluate("sequence-classification", [Margin("accuracy[b]", 0.2)], Predictions(gold), Predictions(candidate),
                 gold, units, ["a", "b", "c"])
    )  # fmt: skip
    assert (found["accuracy[b]"].value, found["accuracy[b]"].samples, found["accuracy[b]"].units) == (0.98, 100, 100)
    assert found["accuracy[a]"].value == pytest.approx(0.98)
    assert found["accuracy[b]"].verdict is Verdict.NON_INFERIOR
    assert "accuracy[c]" not in found
