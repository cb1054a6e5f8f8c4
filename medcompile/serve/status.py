"""How a server fares in one line: of this process for `serve` in a terminal, of any other through its /metrics.

    2 models ready · 14.2 requests/s · 3 running, 0 waiting · 412 tokens/s · TTFT 85 ms · KV 34 % · 0 failed

Rates and medians are of the time between two looks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Look:
    """Every series of /metrics at one moment: name -> labels -> value."""

    at_s: float
    series: Mapping[str, Mapping[Labels, float]] = field(repr=False)

    @staticmethod
    def of(families: Iterable[Metric], at_s: float | None = None) -> Look:
        series: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
        for family in families:
            for sample in family.samples:
                series[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
        return Look(time.monotonic() if at_s is None else at_s, series)

    @staticmethod
    def parsed(text: str) -> Look:
        return Look.of(text_string_to_metric_families(text))

    def sum(self, name: str) -> float:
        return sum(self.series.get(name, {}).values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by one label."""
        found: defaultdict[str, float] = defaultdict(float)
        for labels, value in self.series.get(name, {}).items():
            found[dict(labels).get(label, "")] += value
        return dict(found)


def line(now: Look, before: Look | None = None) -> str:
    """What happened since the look before; with none, since the server began, and without rates."""
    was = before or Look(now.at_s, {})
    passed_s = now.at_s - was.at_s

    def grown(name: str) -> float:
        return max(0.0, now.sum(name) - was.sum(name))

    up = now.by("medcompile_worker_up", "model")
    down = sorted(name for name, value in up.items() if not value)
    ready = len(up) - len(down)
    parts = [f"{ready} {'model' if ready == 1 else 'models'} ready"]
    if down:
        parts.append(f"not ready: {', '.join(down)}")
    if now.sum("medcompile_draining"):
        parts.append("draining")
    if passed_s > 0:
        parts.append(f"{grown('medcompile_requests_total') / passed_s:.1f} requests/s")
    running, waiting = now.sum("medcompile_requests_running"), now.sum("medcompile_requests_waiting")
    parts.append(f"{running:.0f} running, {waiting:.0f} waiting")
    if passed_s > 0 and (tokens := grown("medcompile_generated_tokens_total")):
        parts.append(f"{tokens / passed_s:.0f} tokens/s")
    if passed_s > 0 and (items := grown("medcompile_items_total")):
        parts.append(f"{items / passed_s:.0f} items/s")
    if (first_s := median(now, was, "medcompile_first_token_seconds")) is not None:
        parts.append(f"TTFT {1000 * first_s:.0f} ms")
    if blocks := now.sum("medcompile_kv_blocks"):
        parts.append(f"KV {100 * now.sum('medcompile_kv_blocks_used') / blocks:.0f} %")
    if total := now.sum("medcompile_gpu_memory_bytes"):
        parts.append(f"GPU {now.sum('medcompile_gpu_memory_used_bytes') / 2**30:.1f} of {total / 2**30:.0f} GiB")
    failed = _failed(now) - _failed(was)
    parts.append(f"{max(0.0, failed):.0f} failed")
    return " · ".join(parts)


def median(now: Look, before: Look, histogram: str) -> float | None:
    """The median of what was observed between two looks, straight between its bucket's borders; None of nothing."""
    name = f"{histogram}_bucket"
    then = before.by(name, "le")
    counts = sorted((float(le), value - then.get(le, 0.0)) for le, value in now.by(name, "le").items())
    if not counts or counts[-1][1] <= 0:
        return None
    half = counts[-1][1] / 2
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *counts]):
        if upto >= half:
            return low if high == inf else low + (high - low) * (half - below) / (upto - below)
    return None


def _failed(look: Look) -> float:
    return sum(value for status, value in look.by("medcompile_requests_total", "status").items() if status >= "500")
