"""deploy/: the dashboard and the alert rules ask only for series and labels that a server really has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry

from medcompile.serve.metrics import Metrics, names

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))
SCRAPE = {"instance", "job"}
"""Labels that Prometheus itself adds to every series."""


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


QUERIES = [(p["title"], t["expr"]) for p in panels() for t in p.get("targets", [])]
LEGENDS = [(p["title"], t["legendFormat"], t["expr"]) for p in panels() for t in p.get("targets", [])]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
EXPRESSIONS = [*QUERIES, *((rule["alert"], rule["expr"]) for rule in ALERTS)]


def labels_of() -> dict[str, set[str]]:
    """Every series that a server may have, with its labels."""
    metrics = Metrics()
    known = {name: set(SCRAPE) for name in names(metrics)} | {"up": set(SCRAPE)}
    registry: CollectorRegistry = metrics.registry
    for collector in registry._collector_to_names:
        its = set(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            gpu = {"gpu"} if family.name.startswith("medcompile_gpu") else set()
            for name in [family.name, *(family.name + end for end in ("_total", "_bucket", "_sum", "_count"))]:
                if name in known:
                    known[name] |= its | gpu | ({"le"} if name.endswith("_bucket") else set())
    return known


LABELS = labels_of()


def parsed(expression: str) -> Any:
    """By Prometheus' own grammar, with Grafana's variables filled in. ValueError, also for a rate of no range."""
    return promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$model", ".*"))


def inside(node: Any) -> Iterator[Any]:
    """The node and everything below it."""
    yield node
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        if (below := getattr(node, name, None)) is not None:
            yield from inside(below)
    for argument in getattr(node, "args", ()):
        yield from inside(argument)


def selectors(node: Any) -> list[Any]:
    """Where the query asks for series."""
    return [one for one in inside(node) if isinstance(one, promql_parser.VectorSelector)]


def result_labels(node: Any) -> set[str]:
    """The labels that the query's result has."""
    if isinstance(node, promql_parser.VectorSelector):
        return LABELS[node.name]
    if isinstance(node, promql_parser.AggregateExpr):
        assert node.modifier is None or "By" in str(node.modifier.type), "without: name what is kept"
        return set(node.modifier.labels) if node.modifier else set()
    if isinstance(node, promql_parser.Call):
        below = [result_labels(argument) for argument in node.args]
        return set().union(*below) - ({"le"} if node.func.name == "histogram_quantile" else set())
    for name in ("lhs", "expr", "vector_selector"):
        if (below := getattr(node, name, None)) is not None:
            return result_labels(below)
    return set()


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_every_series_and_label_of_a_query_is_there(title: str, expression: str) -> None:
    query = parsed(expression)
    assert selectors(query), title
    for one in selectors(query):
        assert one.name in LABELS, f"{title} asks for {one.name}, which no server has"
        assert {matcher.name for matcher in one.matchers.matchers} <= LABELS[one.name], title
    for one in inside(query):
        if isinstance(one, promql_parser.AggregateExpr):
            assert result_labels(one) <= set().union(*(LABELS[s.name] for s in selectors(one))), title


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_what_only_ever_grows_is_asked_for_its_rate_and_nothing_else_is(title: str, expression: str) -> None:
    query = parsed(expression)
    rated = [
        selector.name
        for one in inside(query)
        if isinstance(one, promql_parser.Call) and one.func.name in ("rate", "increase")
        for selector in selectors(one)
    ]
    growing = ("_total", "_bucket", "_sum", "_count")
    assert sorted(s.name for s in selectors(query) if s.name.endswith(growing)) == sorted(rated), title


@pytest.mark.parametrize(("title", "legend", "expression"), LEGENDS)
def test_a_legend_names_labels_that_its_query_keeps(title: str, legend: str, expression: str) -> None:
    assert set(re.findall(r"{{(\w+)}}", legend)) <= result_labels(parsed(expression)), title


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_look_at(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 20
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= result_labels(parsed(rule["expr"]))


def test_the_dashboards_panels_have_their_own_places_and_ids() -> None:
    ids = [p["id"] for p in panels()]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        g = panel["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert g["x"] + g["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert() -> None:
    shown = {one.name for _, expression in EXPRESSIONS for one in selectors(parsed(expression))}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in LABELS if name.startswith("medcompile_")}
    assert ours - families <= {
        "medcompile_bundle_info",
        "medcompile_steps_total",
        "medcompile_computed_tokens_total",
        "medcompile_draining",
    }
    assert "label_values(medcompile_bundle_info, model)" in json.dumps(DASHBOARD["templating"])
