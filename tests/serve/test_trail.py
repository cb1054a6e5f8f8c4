"""The audit trail: one record for each request, written before the end of its answer, and no answer without."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medcompile.errors import AuditError
from medcompile.serve.asgi import App, Message, Receive, Scope, Send
from medcompile.serve.audit import AuditLog, Record
from medcompile.serve.chain import records, verify
from medcompile.serve.keys import INFERENCE, Caller
from medcompile.serve.trail import Trail

pytestmark = pytest.mark.anyio

PLANTED = "Ann Planted"


@dataclass
class Tally:
    model: str = "bert"
    digest: str = "ab" * 32
    items: int = 2
    tokens_in: int = 40
    tokens_out: int = 7


def app_of(pieces: list[bytes], *, status: int = 200, route: str = "/v1/x", known: bool = True) -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if route:
            scope["route"] = SimpleNamespace(path=route)
        scope["state"] |= {"tally": Tally(), "purpose": "TREAT"}
        if known:
            scope["state"]["caller"] = Caller("ward-3", frozenset({INFERENCE}))
        await send({"type": "http.response.start", "status": status, "headers": []})
        for number, piece in enumerate(pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces) - 1})

    return app


async def asked(app: App, log: AuditLog, on_send: Callable[[Message], None] = lambda _: None) -> list[Message]:
    return await through(Trail(app, log), on_send)


async def through(trail: Trail, on_send: Callable[[Message], None] = lambda _: None) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        on_send(message)
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope: Scope = {
        "type": "http",
        "path": f"/v1/{PLANTED}",
        "query_string": PLANTED.encode(),
        "client": ("127.0.0.1", 5),
    }
    await trail({**scope, "headers": [], "state": {"request_id": "id-1"}}, receive, send)
    return sent


def requests_in(folder: Path) -> list[dict[str, Any]]:
    return [r for r in records(folder) if r["event"] == "request"]


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
async def test_a_request_is_recorded_with_what_it_took(tmp_path: Path, fsync: Any) -> None:
    with AuditLog(tmp_path, fsync=fsync) as log:
        sent = await asked(app_of([b"a", b"b"]), log)
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body", "http.response.body"]
    (one,) = requests_in(tmp_path)
    assert {k: v for k, v in one.items() if k not in ("n", "time", "hash", "event")} == {
        "caller": "ward-3",
        "request_id": "id-1",
        "route": "/v1/x",
        "status": 200,
        "model": "bert",
        "bundle": "ab" * 32,
        "items": 2,
        "tokens_in": 40,
        "tokens_out": 7,
        "purpose": "TREAT",
        "client": "127.0.0.1",
    }


async def test_the_record_is_there_before_the_last_piece_goes_out(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(message: Message) -> None:
        if not message.get("more_body") and message["type"] == "http.response.body":
            seen.append(len(requests_in(tmp_path)))

    with AuditLog(tmp_path) as log:
        await asked(app_of([b"a", b"b", b"c"]), log, look)
        await asked(app_of([b"whole"]), log, look)
    assert seen == [1, 2]


class Broken:
    """A log whose disk is full."""

    waits = False

    def append(self, record: Record) -> None:
        raise AuditError("full")


async def test_no_answer_goes_out_that_cannot_be_recorded() -> None:
    sent = await asked(app_of([b"secret"]), Broken())  # type: ignore[arg-type]
    assert sent[0]["status"] == 503 and b"audit_log_unavailable" in sent[1]["body"]
    assert not any(b"secret" in m.get("body", b"") for m in sent)


async def test_a_stream_that_cannot_be_recorded_is_not_ended() -> None:
    with pytest.raises(AuditError):
        await asked(app_of([b"a", b"b", b"the end"]), Broken())  # type: ignore[arg-type]


@pytest.mark.parametrize(("error", "status"), [(OSError(), 499), (asyncio.CancelledError(), 499), (KeyError(), 500)])
async def test_a_request_that_did_not_end_is_recorded_as_such(
    tmp_path: Path, error: BaseException, status: int
) -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["caller"] = Caller("ward-3", frozenset())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise error

    async def leaves(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["caller"] = Caller("ward-4", frozenset())

    with AuditLog(tmp_path) as log:
        with pytest.raises(type(error)):
            await asked(breaks, log)
        await asked(leaves, log)
    assert [(r["caller"], r["status"]) for r in requests_in(tmp_path)] == [("ward-3", status), ("ward-4", 499)]


async def test_what_a_client_wrote_as_a_path_is_not_recorded(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        await asked(app_of([b""], route="", status=404), log)
    assert requests_in(tmp_path)[0]["route"] == "unmatched"
    assert PLANTED not in next(tmp_path.glob("*.jsonl")).read_text()


async def test_who_has_no_key_can_not_fill_the_disk_and_is_counted(tmp_path: Path) -> None:
    now_s = [0.0]
    with AuditLog(tmp_path) as log:
        trail = Trail(app_of([b""], status=401, known=False), log, lambda: now_s[0])
        for _ in range(500):
            await through(trail)
        now_s[0] = 1.0
        await through(trail)
    assert [r["refused"] for r in requests_in(tmp_path)] == [1, 500]


async def test_routes_that_machines_ask_are_recorded_only_where_they_fail(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        await asked(app_of([b""], route="/health/live"), log)
        await asked(app_of([b""], route="/metrics"), log)
        await asked(app_of([b""], route="/metrics", status=403), log)
    assert [(r["route"], r["status"]) for r in requests_in(tmp_path)] == [("/metrics", 403)]
    assert verify(tmp_path).whole
