from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from medcompile.errors import AuditError, MedcompileError
from medcompile.serve import batch_calls
from medcompile.serve.audit import Record
from medcompile.serve.batch_calls import Calls
from medcompile.serve.batch_lines import Request
from medcompile.serve.failures import QueueFull, WorkerDown
from medcompile.serve.files import Folder
from medcompile.serve.settings import Limits

PLANTED = "Quokkaville"
REQUEST = Request("a", "/v1/embeddings", {"model": "m", "input": PLANTED})


class Engine:
    """One that fails in the way that it is told to."""

    name, digest, ready = "m", "d", True
    facts: ClassVar[dict[str, str]] = {}

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.images: list[bytes] = []

    async def ask(self, _: str, __: Any, body: bytes, **___: Any) -> None:
        self.images.append(body)
        raise self.error

    async def until_ready(self) -> None:
        await asyncio.sleep(3600)


class Engines:
    limits = Limits()

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def get(self, _: str) -> Engine:
        return self.engine

    def __iter__(self) -> Iterator[Engine]:
        return iter([self.engine])


def calls(error: Exception, **more: Any) -> Calls:
    return Calls(Engines(Engine(error)), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "status", "after_s"), [(QueueFull("x", retry_after_s=2.5), 429, 2.5), (WorkerDown("x"), 503, None)]
)
def test_what_may_pass_is_told_with_its_status_and_when_to_ask_again(
    error: Exception, status: int, after_s: float | None
) -> None:
    answered = asyncio.run(calls(error).ask(REQUEST, "req_1"))
    assert (answered.status, answered.retry_after_s) == (status, after_s)


def test_a_bug_is_one_failed_line_and_nothing_of_the_request_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answered = asyncio.run(calls(ValueError(PLANTED)).ask(REQUEST, "req_1"))
    assert answered.status == 500
    assert json.loads(answered.body)["error"]["type"] == "server_error"
    assert "ValueError" in caplog.text and PLANTED not in caplog.text + answered.body.decode()


def test_an_image_goes_beside_the_body_and_one_that_is_gone_is_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    made = calls(WorkerDown("x"), folder=Folder(tmp_path))
    request = Request("a.png", "/v1/embeddings", {"model": "m", "input": []}, image="a.png")
    assert asyncio.run(made.ask(request, "req_1")).status == 503
    assert made._engines.engine.images == [b"12345"]  # type: ignore[attr-defined]
    (tmp_path / "a.png").unlink()
    assert asyncio.run(made.ask(request, "req_1")).status == 400


def test_without_a_record_in_the_audit_log_there_is_no_answer() -> None:
    class Full:
        waits = False

        def append(self, record: Record) -> None:
            assert (record.route, record.status, record.model) == ("/v1/embeddings", 503, "m")
            raise AuditError("the disk is full")

    with pytest.raises(AuditError):
        asyncio.run(calls(WorkerDown("x"), audit=Full()).ask(REQUEST, "req_1"))


def test_a_model_that_does_not_come_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_calls, "BACK_S", 0.01)
    monkeypatch.setattr(Engine, "ready", False)
    with pytest.raises(MedcompileError, match="m has not come back"):
        asyncio.run(calls(WorkerDown("x")).ready(REQUEST))
    asyncio.run(calls(WorkerDown("x")).ready(Request("a", "/v1/embeddings", {"model": ["none"]})))
