"""deploy/: the dashboard and the alert rules ask only for series and labels that a server really has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
_WORDS = {"by", "without", "or", "and", "unless", "on", "ignoring", "group_left", "group_right", "bool", "offset"}


def names_in(expression: str) -> list[str]:
    """The series that a query asks for: words that are no function, keyword, label or text."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    return [w for w in re.findall(r"(?<![\w$.])([a-z_][a-z0-9_]*)\b(?!\s*\()", bare) if w not in _WORDS]


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_every_series_and_label_of_a_query_is_there(title: str, expression: str) -> None:
    found = names_in(expression)
    assert found, title
    for name in found:
        assert name in LABELS, f"{title} asks for {name}, which no server has"
    selected = {
        w for part in re.findall(r"\{([^}]*)\}", expression) for w in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", part)
    }
    grouped = {w for part in re.findall(r"\bby\s*\(([^)]*)\)", expression) for w in re.findall(r"\w+", part)}
    allowed = set().union(*(LABELS[name] for name in found))
    assert selected | grouped <= allowed, title


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_every_query_is_whole(title: str, expression: str) -> None:
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing), title
    for called in re.findall(r"\b(?:rate|increase)\(([^)]*)\)", expression):
        assert re.search(r"\[[^\]]+\]$", called.strip()), f"{title}: a rate of what has no range"
    for counted in re.findall(r"(?<!\w)((?:medcompile|process)_\w+_(?:total|bucket|sum|count))\b", expression):
        assert re.search(rf"(rate|increase)\({counted}", expression), f"{title}: {counted} only ever grows"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_look_at(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 20
    allowed = {label for name in names_in(rule["expr"]) for label in LABELS[name]}
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= allowed
    kept = re.findall(r"^[^{]*?\bsum by \(([^)]*)\)", rule["expr"])
    if kept:
        used = {w for text in rule["annotations"].values() for w in re.findall(r"\$labels\.(\w+)", text)}
        assert used <= set(re.findall(r"\w+", kept[0])), "a label that the sum dropped"


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
    shown = {name for _, expression in EXPRESSIONS for name in names_in(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in LABELS if name.startswith("medcompile_")}
    assert ours - families <= {
        "medcompile_bundle_info",
        "medcompile_steps_total",
        "medcompile_computed_tokens_total",
        "medcompile_draining",
    }
    assert "label_values(medcompile_bundle_info, model)" in json.dumps(DASHBOARD["templating"])
