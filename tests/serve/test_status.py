from __future__ import annotations

import pytest

from medcompile.serve.metrics import EngineState, Metrics
from medcompile.serve.status import Look, line, median


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(routes=["/v1/embeddings"])
    made.serves("llm", "d", "int4", "t")
    made.worker("llm", True)
    return made


def look(metrics: Metrics, at_s: float) -> Look:
    return Look.of(metrics.registry.collect(), at_s)


def test_the_line_tells_what_happened_between_two_looks(metrics: Metrics) -> None:
    before = look(metrics, 10.0)
    for status in (200, 200, 200, 503):
        metrics.began()
        metrics.request("POST", "/v1/embeddings", status, 0.1)
    metrics.tokens("llm", 10, 800)
    metrics.first_token("llm", 0.05)
    metrics.engine("llm", EngineState(waiting=1, running=3, kv_blocks=100, kv_blocks_used=34))
    assert line(look(metrics, 12.0), before) == (
        "1 model ready · 2.0 requests/s · 3 running, 1 waiting · 400 tokens/s · TTFT 38 ms · KV 34 % · 1 failed"
    )


def test_a_model_that_cannot_answer_is_named(metrics: Metrics) -> None:
    metrics.serves("biobert", "d", "int8", "t")
    metrics.draining()
    told = line(look(metrics, 1.0))
    assert told == "1 model ready · not ready: biobert · draining · 0 running, 0 waiting · 0 failed"


def test_a_server_elsewhere_is_read_from_its_metrics(metrics: Metrics) -> None:
    metrics.items("llm", 30)
    parsed, direct = Look.parsed(metrics.text().decode()), look(metrics, 0.0)
    assert parsed.sum("medcompile_items_total") == 30
    assert parsed.by("medcompile_worker_up", "model") == direct.by("medcompile_worker_up", "model") == {"llm": 1.0}


def test_a_median_lies_in_its_bucket_and_counts_only_what_is_new(metrics: Metrics) -> None:
    metrics.first_token("llm", 50.0)
    before = look(metrics, 0.0)
    assert median(before, before, "medcompile_first_token_seconds") is None
    for _ in range(4):
        metrics.first_token("llm", 0.15)
    found = median(look(metrics, 1.0), before, "medcompile_first_token_seconds")
    assert found is not None and 0.1 < found < 0.2


def test_a_median_beyond_the_last_bucket_is_told_as_its_border(metrics: Metrics) -> None:
    before = look(metrics, 0.0)
    metrics.first_token("llm", 1000.0)
    assert median(look(metrics, 1.0), before, "medcompile_first_token_seconds") == 60.0
