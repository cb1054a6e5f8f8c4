from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from medcompile.serve import logs
from medcompile.serve.metrics import Metrics
from medcompile.serve.watch import App, Message, Receive, Scope, Send, Watch
from tests.serve.test_metrics import series

PLANTED = "Quokkaville"


class Client:
    """One request through an app. leaves: the client is gone when the app asks for more."""

    def __init__(self, path: str = "/v1/embeddings", method: str = "POST", *, leaves: bool = False) -> None:
        self.scope: Scope = {"type": "http", "method": method, "path": path, "client": ("10.0.0.7", 5000)}
        self.scope["state"] = {"caller": SimpleNamespace(name="ward-3")}
        self._messages: list[Message] = [{"type": "http.request", "body": b"12345", "more_body": False}]
        if leaves:
            self._messages.append({"type": "http.disconnect"})
        self.got: list[Message] = []

    async def receive(self) -> Message:
        return self._messages.pop(0)

    async def send(self, message: Message) -> None:
        self.got.append(message)

    def through(self, app: App, metrics: Metrics) -> None:
        asyncio.run(Watch(app, metrics)(self.scope, self.receive, self.send))  # type: ignore[arg-type]


def answers(status: int, *bodies: bytes, route: str = "/v1/embeddings") -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path=route)
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        for i, body in enumerate(bodies):
            await send({"type": "http.response.body", "body": body, "more_body": i + 1 < len(bodies)})

    return app


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(routes=["/v1/embeddings", "/health/live"])


@pytest.fixture
def accesses(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger="medcompile")
    return lambda: [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]


def count(metrics: Metrics, status: str, route: str = "/v1/embeddings") -> float | None:
    return series(metrics, "medcompile_requests_total", method="POST", route=route, status=status)


def test_a_request_is_counted_timed_and_logged_with_sizes_and_the_keys_name(metrics: Metrics, accesses: Any) -> None:
    client = Client()
    client.through(answers(200, b"abc", b"de"), metrics)
    assert count(metrics, "200") == 1
    assert series(metrics, "medcompile_requests_in_progress") == 0
    (told,) = accesses()
    assert 0 < told.pop("seconds") < 5
    assert told == {
        **{"method": "POST", "route": "/v1/embeddings", "status": 200, "received_bytes": 5, "sent_bytes": 5},
        **{"key": "ward-3", "client": "10.0.0.7"},
    }
    assert [message.get("body") for message in client.got] == [None, b"abc", b"de"]


def test_a_client_that_leaves_before_the_end_is_a_499(metrics: Metrics, accesses: Any) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path="/v1/embeddings")
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    Client(leaves=True).through(app, metrics)
    assert count(metrics, "499") == 1 and count(metrics, "200") is None
    assert accesses()[0]["cut"] is True


def test_a_client_that_leaves_after_the_end_is_none(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answers(200, b"all")(scope, receive, send)
        await receive()

    Client(leaves=True).through(app, metrics)
    assert count(metrics, "200") == 1


def test_an_app_that_fails_is_a_500_and_the_error_goes_on(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError(PLANTED)

    with pytest.raises(RuntimeError):
        Client().through(app, metrics)
    assert count(metrics, "500", "other") == 1
    assert series(metrics, "medcompile_requests_in_progress") == 0


def test_a_path_that_no_route_takes_is_told_nowhere(metrics: Metrics, accesses: Any) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"] == f"/v1/{PLANTED}"
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    Client(f"/v1/{PLANTED}").through(app, metrics)
    assert count(metrics, "404", "other") == 1
    assert accesses()[0]["received_bytes"] == accesses()[0]["sent_bytes"] == 0
    assert PLANTED not in json.dumps(accesses()) + metrics.text().decode()


def test_probes_are_counted_and_only_logged_when_they_fail(metrics: Metrics, accesses: Any) -> None:
    Client("/health/live").through(answers(200, b"", route="/health/live"), metrics)
    assert accesses() == []
    Client("/health/live").through(answers(503, b"", route="/health/live"), metrics)
    assert [told["status"] for told in accesses()] == [503]
    assert count(metrics, "200", "/health/live") == 1


def test_what_is_no_request_passes_untouched(metrics: Metrics) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    client = Client()
    client.scope["type"] = "lifespan"
    client.through(app, metrics)
    assert seen == ["lifespan"]
    assert logs.request_id.get() == ""
