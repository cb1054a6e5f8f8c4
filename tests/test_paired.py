"""Paired: b's answers are judged against a's, item by item, and what can't be run or compared says why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medcompile
from medcompile import backends, bundle, paired, verify
from medcompile.bundle import Bundle
from medcompile.errors import BackendUnavailable
from medcompile.paired import Pair, Paired
from medcompile.spec import GRAPH_VERIFIED, Artifact, Axis, Margin, Profile, Verdict
from tests import tiny
from tests.bundles import artifact, contents, write
from tests.command_line import call
from tests.tiny import Workshop

MARGINS = (Margin("cosine", 0.5), Margin("agreement", 0.6), Margin("top1_agreement", 0.9))


def manifest(workshop: Workshop) -> Path:
    return workshop.root / "calibration/held-out.yaml"


@pytest.fixture(scope="module")
def symmetric(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The workshop's bundle with another int8."""
    out = tmp_path_factory.mktemp("symmetric") / "tiny"
    return workshop.build(out=out, overrides=["variants.int8.symmetric=true"])


@pytest.fixture(scope="module")
def tested(workshop: Workshop, symmetric: Bundle) -> Paired:
    before = bundle.read(workshop.bundle)
    return paired.run(before, symmetric, verify.evaluation(before, manifest(workshop)), MARGINS)


def of(found: Paired, graph: str, variant: str = "int8") -> Pair:
    return next(p for p in found.pairs if (p.graph, p.a, p.b) == (graph, variant, variant))


def test_what_did_not_change_is_not_run(tested: Paired) -> None:
    for task in tiny.TASKS:
        pair = of(tested, task, "fp32")
        assert pair.unchanged and not pair.ran and pair.evidence == () and pair.timing is None


def test_the_answers_of_a_are_the_reference(workshop: Workshop, symmetric: Bundle, tested: Paired) -> None:
    texts = [" ".join(record["words"]) for record in tiny.records(40, 2)]
    with (
        medcompile.load(workshop.bundle, variant="int8") as before,
        medcompile.load(symmetric.root, variant="int8") as after,
    ):
        a, b = before.embed(texts), after.embed(texts)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    (cosine,) = [e for e in of(tested, "embed").evidence if e.metric == "cosine"]
    assert cosine.value == pytest.approx(cosines.mean(), abs=1e-6) and cosine.value < 1
    assert (cosine.margin, cosine.verdict, cosine.samples) == (0.5, Verdict.NON_INFERIOR, 40)


def test_decisions_that_changed_are_counted_by_kind(workshop: Workshop, symmetric: Bundle, tested: Paired) -> None:
    pair = of(tested, "sequence-classification")
    (agreement,) = [e for e in pair.evidence if e.metric == "agreement"]
    assert pair.flips is not None
    assert sum(pair.flips.values()) == agreement.discordant
    assert of(tested, "embed").flips is None  # it decides nothing


def test_both_are_timed_at_one_shape(tested: Paired) -> None:
    timing = of(tested, "embed").timing
    assert timing is not None and timing.shape == {"batch": 4, "sequence": 16}
    assert timing.ratio == pytest.approx(timing.b_ms / timing.a_ms, abs=0.01)
    assert timing.spread[0] <= timing.spread[1] and timing.rounds >= 2


def test_graphs_stand_in_for_artifacts_that_cannot_run_here(
    workshop: Workshop, symmetric: Bundle, tested: Paired, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(target: str) -> Any:
        raise BackendUnavailable("no such device here")

    monkeypatch.setattr(backends.get("onnxruntime"), "probe", absent, raising=False)
    before = bundle.read(workshop.bundle)
    found = paired.run(before, symmetric, verify.evaluation(before, manifest(workshop)), MARGINS)
    pair = of(found, "embed")
    assert (pair.ran, pair.reason, pair.timing) == (GRAPH_VERIFIED, "no such device here", None)
    values = [[e.value for e in of(f, "embed").evidence if e.metric == "cosine"] for f in (found, tested)]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_other_labels_are_a_reason_for_those_who_have_any(workshop: Workshop, symmetric: Bundle) -> None:
    before = bundle.read(workshop.bundle)
    for task, differs in (("token-classification", True), ("embed", False)):
        exams = [
            verify.trial(found, task, verify.evaluation(found, manifest(workshop))).exam
            for found in (before, symmetric)
        ]
        renamed = dataclasses.replace(exams[1], labels=("O", "B-Drug", "I-Drug"))  # type: ignore[type-var]
        renamed.__dict__["key"] = dataclasses.replace(exams[1].key, labels=("O", "B-Drug", "I-Drug"))
        told = paired._other_questions(exams[0], renamed)
        assert ("labels differ" in told) is differs


# ---- which are set against each other


def timed(variant: str, latency_ms: float, verdict: Verdict = Verdict.NON_INFERIOR) -> Artifact:
    return artifact(variant, verdict, latency_ms)


def test_variants_of_one_name_are_paired_and_the_best_of_each(tmp_path: Path) -> None:
    a = write(tmp_path / "a", contents([timed("fp32", 9), timed("int8", 5), timed("int8-x", 1, Verdict.INFERIOR)]))
    b = write(tmp_path / "b", contents([timed("fp32", 9), timed("int8-found", 3)]))
    assert [(p.a, p.b) for p in paired.pairs(a, b)] == [("fp32", "fp32"), ("int8", "int8-found")]


def test_bundles_without_a_common_graph_have_nothing_to_test(tmp_path: Path) -> None:
    data = {"evaluation": {"name": "x", "digest": "1" * 64}}
    a = write(tmp_path / "a", dataclasses.replace(contents(), provenance=data))
    other = dataclasses.replace(contents([artifact("fp32", graph="fill-mask")], ["fill-mask"]), provenance=data)
    b = write(tmp_path / "b", other)
    assert "share no target" in paired.why_not(a, b)
    assert "different evaluation data" in paired.why_not(a, write(tmp_path / "c", contents()))
    assert paired.why_not(a, a) == ""


def test_the_common_shape_is_bs_as_near_as_a_allows() -> None:
    def profile(batch: tuple[int, int, int], *more: Axis) -> Profile:
        return Profile("p", (Axis("batch", *batch), *more))

    found = paired.common(profile((1, 2, 4)), profile((2, 8, 16)))
    assert found is not None and found.axes == (Axis("batch", 2, 4, 4),)
    assert paired.common(profile((1, 1, 1)), profile((2, 8, 16))) is None
    assert paired.common(profile((1, 2, 4)), profile((1, 2, 4), Axis("sequence", 1, 2, 3))) is None


# ---- the command


def test_diff_tests_b_against_a_and_says_how(workshop: Workshop, symmetric: Bundle) -> None:
    done = call("diff", workshop.bundle, symmetric.root, "--data", manifest(workshop))
    assert done.exit_code == 0
    for part in (
        "b against a, on the same items",
        "cosine",
        "non-inferior",
        "latency, in turns",
        "variants.int8.symmetric",
    ):
        assert part in done.stdout
    assert "fp32 against fp32: nothing that could change an answer differs" in done.stdout
    assert "int8 of b against int8 of a" in done.stderr


def test_json_holds_the_test_the_times_and_the_changes(workshop: Workshop, symmetric: Bundle) -> None:
    done = call("diff", workshop.bundle, symmetric.root, "--data", manifest(workshop), "--json")
    told = json.loads(done.stdout)
    assert {"symmetric" in c["key"] for c in told["variants"]} == {True}
    pair = next(p for p in told["paired"]["pairs"] if (p["graph"], p["b"]) == ("embed", "int8"))
    assert pair["evidence"][0]["verdict"] == "non-inferior" and pair["timing"]["ratio"] > 0
    assert told["criteria"]["fixed_before"] is True
    assert {i["effect"] for i in told["impact"]} <= {"worse", "better", "differs", "no change shown", "none"}


def test_without_the_data_the_test_is_left_out_unless_it_was_named(workshop: Workshop, symmetric: Bundle) -> None:
    done = call("diff", workshop.bundle, symmetric.root)
    assert done.exit_code == 0 and "was not tested against a: the evidence can't be made again" in done.stdout
    other = call("diff", workshop.bundle, symmetric.root, "--data", workshop.root / "calibration/notes.yaml")
    assert other.exit_code == 1 and "is not the data that" in other.stderr
