"""The change record: three parts, criteria that say whether they were fixed before, no claim beyond what was run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest

from medcompile import bundle, change_record
from medcompile.bundle import Bundle
from medcompile.change_markdown import markdown
from medcompile.change_record import Criteria, effect, from_budget, from_file, record
from medcompile.diff import diff
from medcompile.errors import RecipeError, UsageError
from medcompile.paired import Pair, Paired, Timing
from medcompile.spec import Evidence, Margin, Verdict
from tests.bundles import contents, write
from tests.command_line import call
from tests.tiny import Workshop

CLAIMS = re.compile(r"complian|approv|certif|conform|cleared|PCCP|FDA|MDR", re.IGNORECASE)
PROTOCOL = "date: 2026-01-31\ntitle: New precision\ncriteria:\n  cosine: {max_drop: 0.01}\n"


def sides(tmp_path: Path, *budgets: tuple[Margin, ...]) -> tuple[Bundle, Bundle]:
    a, b = (dataclasses.replace(contents(), budget=budget) for budget in budgets)
    return write(tmp_path / "a", a), write(tmp_path / "b", b)


def evidence(metric: str, interval: tuple[float, float], verdict: Verdict | None = None) -> Evidence:
    middle = sum(interval) / 2
    margin = None if verdict is None else 0.01
    return Evidence(
        metric, 0.8, 0.8 + middle, middle, interval[0], interval, 0.95, 40, 40, "sentence", "exact", margin, verdict
    )


def one(*found: Evidence, **fields: object) -> Paired:
    pair = Pair("fake-cpu", "embed", "fp32", "fp32", ran="verified on device: cpu", items=40, evidence=found)
    return Paired(pairs=(dataclasses.replace(pair, **fields),))  # type: ignore[arg-type]


SAME, WIDER = (Margin("cosine", 0.01),), (Margin("cosine", 0.05),)
CRITERIA = Criteria(SAME, "the budget of b's recipe", True, "unchanged")


def test_a_budget_that_was_kept_was_fixed_before_and_one_that_was_widened_was_not(tmp_path: Path) -> None:
    kept = from_budget(*sides(tmp_path, SAME, SAME))
    assert kept.fixed_before is True and kept.margins == SAME
    widened = from_budget(*sides(tmp_path, SAME, WIDER))
    assert widened.fixed_before is False and "NOT fixed before" in widened.told and widened.margins == WIDER


def test_a_protocol_brings_its_criteria_its_date_and_its_digest(tmp_path: Path) -> None:
    _, b = sides(tmp_path, SAME, SAME)
    file = tmp_path / "protocol.yaml"
    file.write_text(PROTOCOL)
    found = from_file(file, b)
    assert (found.margins, found.date, found.fixed_before) == (SAME, "2026-01-31", None)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest() and "New precision" in found.origin
    (tmp_path / "protocol.json").write_text('{"date": "2026-01-31", "criteria": {"cosine": {"max_drop": 0.01}}}')
    assert from_file(tmp_path / "protocol.json", b).margins == SAME


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("criteria: {cosine: {max_drop: 0.01}}", "date"),
        ("date: yesterday\ncriteria: {cosine: {max_drop: 0.01}}", "date"),
        ("date: 2026-01-31\ncriterion: {cosine: {max_drop: 0.01}}", "criterion"),
        ("date: 2026-01-31\ncriteria: {cosine: {max_drop: 0}}", "max_drop"),
        ("date: 2026-01-31\ncriteria: {f1: {max_drop: 0.01}}", "no metric 'f1' for embed"),
        ("", "empty"),
    ],
)
def test_a_protocol_with_a_mistake_is_refused_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    _, b = sides(tmp_path, SAME, SAME)
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises((RecipeError, UsageError), match=re.escape(told)):
        from_file(tmp_path / "p.yaml", b)


@pytest.mark.parametrize(
    ("metric", "interval", "expected"),
    [
        ("accuracy[yes]", (-0.03, -0.01), "worse"),
        ("f1", (0.01, 0.03), "better"),
        ("f1", (-0.03, 0.01), "no change shown"),
        ("agreement", (-0.03, 0.0), "differs"),
        ("agreement[sex:f]", (-0.03, 0.0), "differs"),
        ("harmful_flips", (-0.03, -0.01), "differs"),
        ("cosine", (-1e-9, 1e-9), "none"),
    ],
)
def test_the_effect_is_what_the_interval_shows(metric: str, interval: tuple[float, float], expected: str) -> None:
    assert effect(evidence(metric, interval)) == expected


def test_every_criterion_has_an_outcome_or_a_reason(tmp_path: Path) -> None:
    a, b = sides(tmp_path, SAME, SAME)

    def outcomes(paired: Paired) -> list[tuple[str, str]]:
        return [(o.outcome, o.why) for o in record(diff(a, b), paired, CRITERIA, b).protocol.outcomes]

    for verdict, outcome in zip(Verdict, ("met", "not met", "not shown"), strict=True):
        assert outcomes(one(evidence("cosine", (-0.1, 0.1), verdict))) == [(outcome, "")]
    assert outcomes(one(ran="", reason="it needs a GPU")) == [("not tested", "it needs a GPU")]
    assert outcomes(one(unchanged=True))[0][0] == "met"


def test_the_record_has_its_three_parts_and_claims_nothing(tmp_path: Path) -> None:
    a, b = sides(tmp_path, SAME, WIDER)
    timing = Timing({"batch": 4}, "verified on device: cpu", 25, 2.0, 1.0, 0.5, (0.4, 0.6))
    found = one(
        evidence("cosine", (-0.02, -0.01), Verdict.INFERIOR),
        evidence("recall@1[ward:icu]", (0.01, 0.02)),
        flips={"harmful": 3, "healed": 1},
        timing=timing,
    )
    text = markdown(record(diff(a, b), found, from_budget(a, b), b))
    parts = [text.index(f"## {n}. ") for n in (1, 2, 3)]
    assert parts == sorted(parts)
    assert "Description of modifications" in text and "Verification protocol" in text and "Impact assessment" in text
    assert "budget.cosine" not in text and "| cosine.max_drop | 0.01 | 0.05 |" in text
    assert "NOT fixed before" in text and "**not met**" in text and "| 40 | 3 | 1 | 0 |" in text and "0.500" in text
    assert "### Not assessed" in text and "subgroups" not in text[text.index("### Not assessed") :]
    assert not CLAIMS.search(text)


def test_what_was_not_assessed_is_listed(tmp_path: Path) -> None:
    a, b = sides(tmp_path, SAME, SAME)
    made = record(diff(a, b), Paired("they were judged on different evaluation data"), CRITERIA, b)
    told = "\n".join(made.impact.not_assessed)
    assert "different evaluation data" in told and "recipe.resolved.yaml" in told
    assert "Nothing was run" in markdown(made)
    made = record(diff(a, b), one(evidence("f1", (-0.1, 0.1))), CRITERIA, b)
    told = "\n".join(made.impact.not_assessed)
    assert "cosine of embed" in told and "subgroups" in told and "single labels" in told


def test_the_command_writes_markdown_and_json(small: Workshop, tmp_path: Path) -> None:
    other = small.build(out=tmp_path / "b", overrides=["variants.int8.symmetric=true", "budget.cosine.max_drop=0.4"])
    file = tmp_path / "protocol.yaml"
    file.write_text(PROTOCOL)
    data = small.root / "calibration/held-out.yaml"
    done = call("diff", small.bundle, other.root, "--data", data, "--protocol", file, "--record", tmp_path / "c.md")
    text = (tmp_path / "c.md").read_text()
    assert done.exit_code == 0 and f"change record: {tmp_path / 'c.md'}" in done.stderr
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text and "Dated 2026-01-31" in text
    assert "| variants.int8.symmetric | False | True |" in text and "**met**" in text and not CLAIMS.search(text)
    done = call("diff", small.bundle, other.root, "--no-run", "--record", tmp_path / "c.json", "--json")
    told = json.loads((tmp_path / "c.json").read_text())
    assert done.exit_code == 0 and json.loads(done.stdout)["identical"] is False
    assert told["kind"] == "change record" and told["schema_version"] == change_record.SCHEMA_VERSION
    assert told["protocol"]["criteria"]["fixed_before"] is False
    assert {"modifications", "protocol", "impact"} <= told.keys()
    assert bundle.read(other.root).digest == told["modifications"]["b"]["digest"]


def test_a_record_of_another_kind_or_place_is_refused(small: Workshop, tmp_path: Path) -> None:
    done = call("diff", small.bundle, small.bundle, "--record", tmp_path / "c.pdf")
    assert done.exit_code == 2 and ".md or .json" in done.stderr
    done = call("diff", small.bundle, small.bundle, "--record", tmp_path / "none/c.md")
    assert done.exit_code == 2 and "can be written" in done.stderr
