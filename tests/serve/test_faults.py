"""Processes that die, lines that are full, time that is over, servers that stop: and nobody else is harmed."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import command_line
from tests.serve.conftest import ON_CPU
from tests.serve.servers import Server, wait_for
from tests.tiny import PLANTED, Workshop

LONG = {"model": "llm", "prompt": "x", "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture
def two(decoder: Path, workshop: Workshop) -> Iterator[Server]:
    with Server(f"llm={decoder}", f"text={workshop.bundle}", *ON_CPU, "--queue", 4, "--drain", 20) as running:
        yield running


def test_a_killed_worker_answers_503_to_its_own_and_comes_back_and_the_others_notice_nothing(two: Server) -> None:
    pids = two.workers()
    with ThreadPoolExecutor(8) as pool:
        doomed = [pool.submit(two.post, "/v1/completions", LONG | {"prompt": PLANTED}) for _ in range(3)]
        wait_for(lambda: two.metric("medcompile_requests_running", model="llm") == 3)
        stop = threading.Event()

        def ask_the_other() -> list[int]:
            seen = []
            while not stop.is_set():
                seen.append(two.post("/v1/embeddings", {"model": "text", "input": "fever"}).status_code)
            return seen

        others = [pool.submit(ask_the_other) for _ in range(2)]
        os.kill(pids["llm"], signal.SIGKILL)
        told = [future.result() for future in doomed]
        assert [response.status_code for response in told] == [503] * 3
        assert all(response.json()["error"]["code"] == "model_unavailable" for response in told)
        assert all(int(response.headers["retry-after"]) >= 1 for response in told)
        assert two.http.get("/health/live").status_code == 200
        wait_for(lambda: two.http.get("/health/ready").status_code == 200, 60)
        stop.set()
        seen = [status for future in others for status in future.result()]
    assert set(seen) == {200}
    assert len(seen) > 5
    assert two.post("/v1/completions", LONG | {"max_tokens": 4}).status_code == 200
    assert two.workers()["text"] == pids["text"]
    assert two.metric("medcompile_worker_restarts_total", model="llm") == 1
    assert not any(word in "".join(two.said) for word in PLANTED.split())


def test_a_stream_whose_worker_dies_ends_with_an_error_that_the_client_raises(two: Server) -> None:
    stream = two.openai().completions.create(
        model="llm", prompt="x", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    os.kill(two.workers()["llm"], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ended during this request"):
        list(stream)


def test_the_client_that_retries_gets_its_answer_after_a_worker_died(two: Server) -> None:
    patient = two.openai(max_retries=8)
    os.kill(two.workers()["llm"], signal.SIGKILL)
    wait_for(lambda: two.http.get("/health/ready").status_code == 503)
    assert patient.completions.create(model="llm", prompt="x", max_tokens=4).choices


def test_a_full_line_turns_the_background_away_first_and_emergencies_last(two: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        held = [pool.submit(two.post, "/v1/completions", LONG | {"max_tokens": 1500}) for _ in range(3)]
        wait_for(lambda: two.metric("medcompile_requests_running", model="llm") == 3)
        short = LONG | {"max_tokens": 2}
        turned_away = two.post("/v1/completions", short | {"priority": "background"})
        assert turned_away.status_code == 429
        assert turned_away.json()["error"]["code"] == "queue_full"
        assert 1 <= int(turned_away.headers["retry-after"]) <= 60
        held.append(pool.submit(two.post, "/v1/completions", LONG | {"max_tokens": 1500}))
        wait_for(lambda: two.metric("medcompile_requests_running", model="llm") == 4)
        assert two.post("/v1/completions", short).status_code == 429
        assert two.post("/v1/completions", short | {"priority": "emergency"}).status_code == 200
        assert two.post("/v1/embeddings", {"model": "text", "input": "x"}).status_code == 200
        patient = two.openai(max_retries=10)
        assert patient.completions.create(model="llm", prompt="x", max_tokens=2).choices
        assert [future.result().status_code for future in held] == [200] * 4
    assert two.metric("medcompile_refused_total", reason="queue_full") >= 2


def test_an_answer_that_takes_longer_than_the_limit_is_given_up_with_504(decoder: Path) -> None:
    with Server(f"llm={decoder}", *ON_CPU, "--timeout", 0.3) as server:
        response = server.post("/v1/completions", LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_passed")
        wait_for(lambda: server.metric("medcompile_requests_running") == 0)


def test_a_stop_lets_answers_under_way_end_and_takes_nothing_new(two: Server) -> None:
    stream = two.openai().completions.create(
        model="llm", prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    two.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{two.url}/health/live")
    assert len(list(stream)) > 500
    assert two.process.wait(30) == 0


def test_a_stop_ends_every_process(two: Server) -> None:
    pids = two.workers()
    assert two.stop() == 0
    for pid in pids.values():
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_workers_end_when_their_server_is_killed(two: Server) -> None:
    pids = two.workers()
    two.stop(signal.SIGKILL)
    for pid in pids.values():
        wait_for(lambda pid=pid: _gone(pid))  # type: ignore[misc]


def _gone(pid: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def test_a_bundle_that_can_not_be_loaded_keeps_the_server_from_starting(workshop: Workshop, tmp_path: Path) -> None:
    broken = workshop.copy(tmp_path / "w").bundle
    artifact = next(broken.glob("artifacts/onnxruntime-cpu/fp32/**/*.onnx"))
    artifact.write_bytes(b"\0" + artifact.read_bytes()[1:])
    for arguments, words in (
        ((broken, *ON_CPU), "differ from what bundle.json recorded"),
        ((tmp_path / "nothing",), "nothing"),
        ((workshop.bundle, workshop.bundle), "two bundles are named tiny"),
        ((workshop.bundle, "--host", "0.0.0.0"), "has no keys"),
        ((workshop.bundle, "--variant", "int3"), "has no variant"),
    ):
        done = command_line.spawn("serve", *arguments, "--port", 0)
        assert done.returncode in (1, 2), done.stderr
        assert re.search(words, done.stderr), done.stderr
        assert "fix:" in done.stderr


def test_a_worker_leaves_no_dump_of_its_memory_and_tells_no_text_when_it_crashes(two: Server, tmp_path: Path) -> None:
    pid = two.workers()["llm"]
    limits = Path(f"/proc/{pid}/limits").read_text()
    (core,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    assert core.split()[4:6] == ["0", "0"]
    with ThreadPoolExecutor() as pool:
        doomed = pool.submit(two.post, "/v1/completions", LONG | {"prompt": PLANTED})
        wait_for(lambda: two.metric("medcompile_requests_running", model="llm") == 1)
        os.kill(pid, signal.SIGSEGV)
        assert doomed.result().status_code == 503
    wait_for(lambda: two.http.get("/health/ready").status_code == 200, 60)
    assert not any(word in "".join(two.said) for word in PLANTED.split())


def test_a_request_without_a_whole_body_or_with_odd_headers_harms_nobody(two: Server) -> None:
    port = int(two.url.rpartition(":")[2])
    odd: list[bytes] = [
        b"",
        b"GET",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n{",
        b"\x16\x03\x01 tls hello",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n",
    ]
    for raw in odd:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(raw)
    body: dict[str, Any] = {"model": "text", "input": "x"}
    assert two.post("/v1/embeddings", body).status_code == 200


def test_status_tells_in_one_line_how_a_server_fares(two: Server) -> None:
    two.post("/v1/embeddings", {"model": "text", "input": "x"})
    done = command_line.spawn("status", two.url, "--seconds", 0.2)
    assert done.returncode == 0, done.stderr
    assert "2 models ready" in done.stdout
    nobody = command_line.spawn("status", "http://127.0.0.1:9", "--seconds", 0.2)
    assert nobody.returncode == 1
    assert "fix:" in nobody.stderr
