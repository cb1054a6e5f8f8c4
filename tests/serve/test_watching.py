"""What /metrics and /health tell of a real server at work."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from medcompile.serve import server as server_process
from medcompile.serve.metrics import Metrics
from tests.serve.servers import Server


def test_what_models_do_is_counted_once_however_often_it_is_looked_at(server: Server) -> None:
    def counted() -> dict[str, float]:
        return {
            "texts": server.metric("medcompile_items_total", model="text"),
            "batches": server.metric("medcompile_batch_size_count", model="text"),
            "prompt": server.metric("medcompile_prompt_tokens_total", model="text"),
            "steps": server.metric("medcompile_batch_size_count", model="llm"),
            "made": server.metric("medcompile_generated_tokens_total", model="llm"),
            "first": server.metric("medcompile_first_token_seconds_count", model="llm"),
            "between": server.metric("medcompile_output_token_seconds_count", model="llm"),
            "queued": server.metric("medcompile_queue_seconds_count", model="llm"),
        }

    before = counted()
    server.post("/v1/embeddings", {"model": "text", "input": ["chest pain", "no fever", "x"]})
    server.post("/v1/completions", {"model": "llm", "prompt": "x", "max_tokens": 9, "ignore_eos": True})
    counted()
    after = counted()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["texts"] == 3
    assert 1 <= grown["batches"] <= 3
    assert grown["prompt"] >= 5
    assert 9 <= grown["steps"] <= 12
    assert grown["made"] == 9
    assert grown["first"] == grown["between"] == grown["queued"] == 1


def test_requests_are_counted_by_route_and_status(server: Server) -> None:
    asked = {"route": "/v1/entities", "status": "200"}
    before = server.metric("medcompile_requests_total", **asked)
    server.post("/v1/entities", {"model": "text", "input": "x"})
    server.post("/v1/entities", {"model": "text"})
    assert server.metric("medcompile_requests_total", **asked) == before + 1
    assert server.metric("medcompile_requests_total", route="/v1/entities", status="400") >= 1


def test_blocks_memory_and_models_are_told(server: Server) -> None:
    assert server.metric("medcompile_kv_blocks", model="llm") > 0
    assert server.metric("medcompile_kv_blocks_used", model="llm") >= 0
    assert server.metric("medcompile_worker_up") == 3
    told = server.http.get("/metrics").text
    assert re.search(r'medcompile_bundle_info\{digest="[0-9a-f]{64}",model="llm"', told)
    resident = [line for line in told.splitlines() if "resident" in line and 'model="text"' in line]
    assert float(resident[-1].split()[-1]) > 10_000_000


def test_health_tells_each_models_state(server: Server) -> None:
    ready = server.http.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ok", "models": {"llm": "ready", "text": "ready", "pair": "ready"}}


@pytest.mark.anyio
async def test_a_terminal_is_told_a_line_when_something_happened_and_none_when_nothing_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Quiet:
        metrics = Metrics(("/v1/embeddings",))

        async def look(self) -> None: ...

    monkeypatch.setattr(server_process, "STATUS_S", 0.05)
    said: list[str] = []
    its: Any = Quiet()
    telling = asyncio.create_task(server_process._tell(its, said.append))
    await asyncio.sleep(0.2)
    assert said == []
    its.metrics.began()
    its.metrics.request("POST", "/v1/embeddings", 200, 0.01)
    await asyncio.sleep(0.2)
    telling.cancel()
    assert len(said) == 1
    assert "requests/s" in said[0]
