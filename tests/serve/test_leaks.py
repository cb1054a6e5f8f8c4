"""A patient's name goes through all that the server takes, rightly and wrongly, and stands nowhere afterwards."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medcompile.serve.chain import records, verify
from medcompile.serve.keys import ADMIN, Key, digest, edited, new_key
from tests.serve.conftest import ON_CPU
from tests.serve.servers import Server, wait_for
from tests.tiny import Workshop

NAME = "Zdenka Vondrackova"
GIVEN = NAME.partition(" ")[0]
WORDS = (*NAME.split(), "Vondrackov", base64.b64encode(NAME.encode()).decode()[:20], "zdenka", "VONDRACKOVA")
HEADERS = {
    "X-Request-ID": NAME,
    "User-Agent": NAME,
    "Referer": f"http://localhost/{NAME}",
    "Cookie": f"name={NAME}",
    "X-Priority": NAME,
    "Accept": f"text/{NAME.replace(' ', '')}",
}


def png() -> bytes:
    """An image whose own text holds the name."""
    info = PngInfo()
    info.add_text("PatientName", NAME)
    out = io.BytesIO()
    Image.new("L", (32, 32)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


@pytest.fixture(scope="module")
def redis() -> Iterator[Any]:
    """A Redis that can be looked into, spoken to over a socket."""
    fakeredis = pytest.importorskip("fakeredis")
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def keyed(decoder: Path, workshop: Workshop, pair: Workshop, place: Path, redis: Any) -> Iterator[Server]:
    """A server with keys, an audit log, and a cache in a Redis that keeps generated answers as well."""
    key = new_key()
    with edited(place / "keys") as keys:
        keys.append(Key("ward-3", (ADMIN,), digest(key), 0))
    host, port = redis.server_address
    bundles = (f"llm={decoder}", f"text={workshop.bundle}", f"pair={pair.bundle}")
    with Server(
        *bundles,
        *ON_CPU,
        *("--api-key-file", place / "keys", "--audit-log", place / "audit", "--log-level", "debug"),
        *("--cache", f"redis://{host}:{port}/0", "--cache-generations"),
        key=key,
    ) as running:
        yield running


def bodies() -> Iterator[tuple[str, Any]]:
    """What is good, and what is wrong in many ways, with the name in it each time."""
    image = "data:image/png;base64," + base64.b64encode(png()).decode()
    chat = {"model": "llm", "messages": [{"role": "user", "content": NAME}], "max_tokens": 4}
    yield "/v1/chat/completions", chat
    yield "/v1/chat/completions", chat | {"stream": True}
    yield "/v1/completions", {"model": "llm", "prompt": NAME, "max_tokens": 4, "echo": True}
    yield "/v1/embeddings", {"model": "text", "input": NAME, "user": NAME, "metadata": {NAME: NAME}}
    yield "/v1/entities", {"model": "text", "input": [f"{NAME} has asthma."]}
    yield "/v1/classify", {"model": "text", "input": NAME}
    yield "/v1/rerank", {"model": "text", "query": NAME, "documents": [NAME, "x"], "return_documents": True}
    yield "/v1/match", {"model": "pair", "images": [image], "prompts": [NAME, "x"]}
    # wrong
    yield "/v1/chat/completions", chat | {"model": NAME}
    yield "/v1/chat/completions", chat | {NAME: NAME}
    yield "/v1/chat/completions", chat | {"temperature": NAME}
    yield "/v1/chat/completions", chat | {"stop": [NAME] * 50}
    yield "/v1/chat/completions", chat | {"messages": [{"role": NAME, "content": {"text": NAME}}]}
    yield "/v1/chat/completions", chat | {"messages": NAME}
    yield "/v1/chat/completions", chat | {"response_format": {"type": "regex", "regex": f"({NAME}"}}
    yield (
        "/v1/chat/completions",
        chat | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": NAME}}}},
    )
    yield "/v1/completions", {"model": "llm", "prompt": NAME * 5000, "max_tokens": 4}
    yield "/v1/embeddings", {"model": "text", "input": [NAME, 5]}
    yield "/v1/embeddings", {"model": "text", "input": NAME, "priority": NAME}
    yield "/v1/embeddings", {"model": "text", "input": NAME, "dimensions": 10**6}
    yield "/v1/entities", {"model": "llm", "input": NAME}
    yield "/v1/rerank", {"model": "text", "query": NAME, "documents": []}
    yield "/v1/match", {"model": "pair", "images": [NAME], "prompts": [NAME]}
    yield (
        "/v1/match",
        {
            "model": "pair",
            "images": ["data:image/png;base64," + base64.b64encode(NAME.encode()).decode()],
            "prompts": [NAME],
        },
    )
    yield "/v1/match", {"model": "pair", "images": [f"https://ehr.example/{NAME}"], "prompts": {NAME: [NAME]}}
    yield f"/v1/{NAME}", {"model": "text", "input": NAME}


def raw() -> Iterator[tuple[str, bytes, Mapping[str, str]]]:
    yield "/v1/embeddings", NAME.encode(), {"Content-Type": "application/json"}
    yield "/v1/embeddings", b'{"model": "text", "input": "' + NAME.encode(), {"Content-Type": "application/json"}
    yield "/v1/embeddings", json.dumps({"input": NAME}).encode("utf-16"), {"Content-Type": "application/json"}
    yield "/v1/embeddings", b"{}", {"Content-Type": f"text/{NAME}"}
    yield "/v1/match", NAME.encode(), {"Content-Type": f"multipart/form-data; boundary={NAME}"}
    yield "/v1/embeddings?" + NAME, b"{}", {"Content-Type": "application/json"}


def ask_all(server: Server) -> list[httpx.Response]:
    answers = [server.post(url, body, headers=HEADERS) for url, body in bodies() for _ in range(2)]
    answers += [server.http.post(url, content=content, headers={**HEADERS, **more}) for url, content, more in raw()]
    files = [("images", (f"{NAME}.png", png(), f"image/{NAME}")), ("images", (NAME, NAME.encode(), "image/png"))]
    for fields in ({"model": "pair", "prompts": [NAME, "x"]}, {"model": NAME, "prompts": NAME}, {NAME: NAME}):
        answers += [
            server.http.post("/v1/match", data=fields, files=files[:count], headers=HEADERS) for count in (1, 2)
        ]
    answers += [server.http.request(GIVEN.upper(), "/v1/models"), server.http.get(f"/v1/models/{NAME}")]
    answers.append(httpx.get(f"{server.url}/{NAME}", headers={"Authorization": f"Bearer {NAME}"}))
    answers.append(server.http.get("/v1/models", headers={"X-Purpose-Of-Use": NAME}))
    answers.append(server.http.get("/v1/models", headers={"Origin": f"https://{GIVEN}.example"}))
    return answers


def found_in(text: str | bytes) -> list[str]:
    told = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return [word for word in WORDS if word in told]


def test_a_planted_name_is_in_no_log_metric_audit_record_cache_entry_or_error(
    keyed: Server, place: Path, redis: Any
) -> None:
    answers = ask_all(keyed)
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) >= 16 and max(statuses) < 500, statuses
    for answer in answers:
        head = " ".join(f"{k}: {v}" for k, v in answer.headers.items())
        assert not found_in(head)
        if answer.status_code >= 400:
            assert not found_in(answer.text), answer.text
    assert not found_in(keyed.http.get("/metrics").text)
    client = pytest.importorskip("redis").Redis(*redis.server_address)
    names = client.keys("*")
    assert len(names) >= 6
    for name in names:
        assert not found_in(name) and not found_in(client.get(name))
    assert keyed.metric("medcompile_response_cache_total", result="hit") >= 6
    assert verify(place / "audit").whole
    for file in (place / "audit").iterdir():
        assert not found_in(file.read_bytes())
    told = [r for r in records(place / "audit") if r["event"] == "request"]
    assert {r["caller"] for r in told} == {"ward-3", ""} and {r["route"] for r in told} >= {"/v1/match", "unmatched"}
    assert any(r.get("cached") for r in told)
    assert len([r for r in told if r["caller"]]) >= len(answers) - 3
    assert not found_in("".join(keyed.said)), [line for line in keyed.said if found_in(line)][:3]


def test_a_planted_name_is_in_nothing_that_a_crash_leaves(keyed: Server, place: Path) -> None:
    before = {path for path in Path("/tmp").iterdir() if path.name.startswith(("core", "crash"))}
    dead = keyed.workers()["text"]
    keyed.post("/v1/embeddings", {"model": "text", "input": NAME + " once more"})
    os.kill(dead, signal.SIGSEGV)
    wait_for(lambda: keyed.workers().get("text", dead) != dead, 60)
    wait_for(lambda: keyed.http.get("/health/ready").status_code == 200, 60)
    cores = {path for path in Path("/tmp").iterdir() if path.name.startswith(("core", "crash"))}
    assert cores == before and not list(Path.cwd().glob("core*"))
    assert not found_in("".join(keyed.said))
