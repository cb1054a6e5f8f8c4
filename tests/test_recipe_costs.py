"""Budgets of costs, flips and worst subgroups in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from medcompile import recipe
from medcompile.spec import Margin
from tests.test_recipe import GOOD, folder, problems, write

__all__ = ["folder"]  # a fixture

TAGGING = GOOD.replace("[embed]", "[token-classification]").replace("  pooling: mean\n", "")
CLASSES = GOOD.replace("[embed]", "[sequence-classification]").replace("  pooling: mean\n", "")
PLAIN = "cosine: {max_drop: 0.01}"


@pytest.mark.parametrize(
    ("text", "costs"),
    [
        (TAGGING, {"missed": 10.0, "false_alarm": 1.0}),
        (CLASSES, {"disease": {"healthy": 10.0, "unclear": 2.5}}),
    ],
)
def test_costs_come_with_the_margin_and_back_into_the_resolved_recipe(
    folder: Path, text: str, costs: dict[str, object]
) -> None:
    path = write(folder, text.replace(PLAIN, f"cost: {{max_drop: 1.5, costs: {costs}}}".replace("'", "")))
    loaded = recipe.load(path)
    assert loaded.budget == (Margin("cost", 1.5, 0.95, costs),)
    path.write_text(recipe.resolved(loaded))
    assert recipe.load(path).budget == loaded.budget


def test_a_worst_subgroup_may_be_asked_of_any_column(folder: Path) -> None:
    path = write(folder, TAGGING.replace(PLAIN, "recall[worst:site]: {max_drop: 0.05}"))
    assert recipe.load(path).budget == (Margin("recall[worst:site]", 0.05),)


@pytest.mark.parametrize(
    ("text", "budget", "told"),
    [
        (TAGGING, "cost: {max_drop: 0.1}", "missing key 'costs'"),
        (TAGGING, "cost: {max_drop: 0.1, costs: {late: 1}}", "missed and false_alarm"),
        (TAGGING, "f1: {max_drop: 0.1, costs: {missed: 1}}", "costs belong to the metric cost"),
        (CLASSES, "cost: {max_drop: 0.1, costs: {a: {b: -1}}}", "-1 is no cost"),
        (CLASSES, "cost: {max_drop: 0.1, costs: {a: {b: {c: 1}}}}", "is no cost"),
        (CLASSES, "flips: {max_drop: 1}", "1 is not less than 1"),
        (CLASSES, "cosine[worst:site]: {max_drop: 0.1}", "no metric"),
    ],
)
def test_a_bad_margin_is_told(folder: Path, text: str, budget: str, told: str) -> None:
    found = problems(folder, text.replace(PLAIN, budget))
    assert any(told in str(p) for p in found), "\n".join(map(str, found))
