from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from medcompile.serve.metrics import EngineState, Metrics
from medcompile.serve.status import Look, line, median
from tests.command_line import call


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


class Served(BaseHTTPRequestHandler):
    """A server that has only /metrics, and wants a key where it was given one."""

    metrics = Metrics()
    key = ""

    def do_GET(self) -> None:
        allowed = not self.key or self.headers.get("Authorization") == f"Bearer {self.key}"
        self.send_response((200 if allowed else 401) if self.path == "/metrics" else 404)
        self.end_headers()
        if allowed:
            self.wfile.write(self.metrics.text())
        self.metrics.tokens("llm", 0, 50)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("MEDCOMPILE_KEY", raising=False)
    monkeypatch.setattr(Served, "metrics", metrics)
    with HTTPServer(("127.0.0.1", 0), Served) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("end", ["", "/"])
def test_the_command_tells_the_line_of_a_running_server(url: str, end: str) -> None:
    done = call("status", url + end, "--seconds", 0.2)
    assert done.exit_code == 0
    assert done.stdout.startswith("1 model ready · 0.0 requests/s · ") and "tokens/s" in done.stdout


def test_the_command_takes_its_key_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Served, "key", "secret")
    done = call("status", url, "--seconds", 0.2)
    assert done.exit_code == 1 and "role metrics" in done.stderr
    monkeypatch.setenv("MEDCOMPILE_KEY", "secret")
    assert call("status", url, "--seconds", 0.2).exit_code == 0


def test_the_command_says_what_keeps_it_from_a_server(url: str) -> None:
    assert "answers 404" in call("status", f"{url}/elsewhere").stderr
    done = call("status", "http://127.0.0.1:1")
    assert done.exit_code == 1 and "fix: give the URL" in done.stderr
