"""Whatever is sent, nothing answers 5xx: what the OpenAPI document allows, what it does not, and bytes of chance."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.serve.servers import Server

schemathesis = pytest.importorskip("schemathesis")

MODELS = ("llm", "text", "pair")
PLENTY = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


@pytest.fixture(scope="module")
def api(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


@pytest.mark.parametrize("mode", MODES, ids=("allowed", "not-allowed"))
def test_nothing_that_the_document_describes_or_excludes_answers_5xx(api: Any, mode: Any) -> None:
    statuses: Counter[int] = Counter()
    for operation in (found.ok() for found in api.get_all_operations()):
        if mode is MODES[1] and operation.method.upper() == "GET":
            continue

        @settings(PLENTY, max_examples=30)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            statuses[_asked(case).status_code] += 1

        check()
    assert statuses[200] > 10 if mode is MODES[0] else statuses[400] > 50, statuses


def _asked(case: Any) -> Any:
    """Half of them name a model that is served, and ask for a few tokens alone: else most would be answered 404."""
    body = case.body
    if isinstance(body, dict):
        if "model" in body and len(json.dumps(body, default=str)) % 2:
            body["model"] = MODELS[len(body) % 3]
        body |= {name: 3 for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)}
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], 3)
    response = case.call()
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        told = json.loads(response.content)["error"]
        assert set(told) == {"message", "type", "param", "code"} and told["message"]
    return response


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
good = {
    "/v1/chat/completions": {"model": "llm", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/completions": {"model": "llm", "prompt": "x", "max_tokens": 2},
    "/v1/embeddings": {"model": "text", "input": "x"},
    "/v1/rerank": {"model": "text", "query": "x", "documents": ["y"]},
    "/v1/entities": {"model": "text", "input": "x"},
    "/v1/classify": {"model": "text", "input": "x"},
    "/v1/match": {"model": "pair", "images": [], "prompts": ["x", "y"]},
}


def answered(response: httpx.Response) -> None:
    assert response.status_code < 500, (response.status_code, response.text)
    if response.status_code >= 400:
        assert response.json()["error"]["message"]


@PLENTY
@given(url=st.sampled_from(sorted(good)), data=st.data())
def test_a_body_with_one_value_of_chance_is_answered_or_refused(server: Server, url: str, data: st.DataObject) -> None:
    body: dict[str, Any] = json.loads(json.dumps(good[url]))
    name = data.draw(
        st.sampled_from([*body, "stop", "temperature", "seed", "priority", "n", "response_format", "dimensions"])
    )
    body[name] = data.draw(json_values)
    answered(server.http.post(url, content=json.dumps(body), headers={"Content-Type": "application/json"}))


@PLENTY
@given(url=st.sampled_from(sorted(good)), data=st.data())
def test_json_with_bytes_changed_cut_or_put_in_is_answered_or_refused(
    server: Server, url: str, data: st.DataObject
) -> None:
    body = data.draw(altered(json.dumps(good[url]).encode()))
    answered(server.http.post(url, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "text", "input": ' + b"[" * 20_000,
        b'{"model": "text", "input": "' + b"\\ud800" * 10 + b'"}',
        b'{"model": "text", "input": "\\u0000"}',
        b'{"model": "text", "input": 1e999999}',
        b'{"model": "text", "input": ' + b"9" * 100_000 + b"}",
        b'{"model": "text", "input": ["' + b'","'.join([b"x"] * 5000) + b'"]}',
        b'{"model": "text", "input": "x", "model": "pair"}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"",
        b"null",
    ],
    ids=range(13),
)
@pytest.mark.parametrize("url", ["/v1/embeddings", "/v1/chat/completions"])
def test_json_made_to_hurt_is_refused(server: Server, url: str, body: bytes) -> None:
    answered(server.http.post(url, content=body, headers={"Content-Type": "application/json"}))


# ---- images


@st.composite
def altered(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with some bytes changed, cut off, put in, or a stretch of it doubled."""
    made = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(made) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "put", "double", "zero"]))
        if how == "flip" and made:
            made[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del made[at:]
        elif how == "put":
            made[at:at] = draw(st.binary(max_size=8))
        elif how == "double":
            made[at:at] = made[at : at + 40]
        else:
            made[at : at + 4] = b"\0" * 4
    return bytes(made)


def _files() -> Iterator[tuple[str, bytes]]:
    picture = Image.effect_noise((24, 20), 80)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        out = io.BytesIO()
        picture.save(out, kind)
        yield kind, out.getvalue()


FILES = dict(_files())


@PLENTY
@given(kind=st.sampled_from(sorted(FILES)), as_url=st.booleans(), data=st.data())
def test_an_image_file_with_bytes_changed_is_answered_or_refused(
    server: Server, kind: str, as_url: bool, data: st.DataObject
) -> None:
    file = data.draw(altered(FILES[kind]))
    if as_url:
        image = f"data:image/{kind.lower()};base64,{base64.b64encode(file).decode()}"
        answered(server.post("/v1/match", {"model": "pair", "images": [image], "prompts": ["x", "y"]}))
    else:
        form = {"model": "pair", "prompts": ["x", "y"]}
        answered(server.http.post("/v1/match", data=form, files=[("images", ("a", file, "image/png"))]))


@PLENTY
@given(data=st.data())
def test_a_form_with_bytes_changed_is_answered_or_refused(server: Server, data: st.DataObject) -> None:
    request = server.http.build_request(
        "POST", "/v1/match", data={"model": "pair", "prompts": ["x", "y"]}, files=[("images", ("a", FILES["PNG"]))]
    )
    body = data.draw(altered(request.read()))
    kind = {"Content-Type": request.headers["content-type"]}
    answered(server.http.post("/v1/match", content=body, headers=kind))


def _bomb(size: int) -> bytes:
    """A small PNG that says it is size x size."""
    out = io.BytesIO()
    Image.new("1", (size, size)).save(out, "PNG")
    return out.getvalue()


def test_a_bomb_of_an_image_is_refused_in_little_memory(server: Server) -> None:
    worker = Path(f"/proc/{server.workers()['pair']}/status")

    def peak_mib() -> int:
        return int(worker.read_text().partition("VmHWM:")[2].split()[0]) >> 10

    before = peak_mib()
    response = server.http.post(
        "/v1/match", data={"model": "pair", "prompts": ["x", "y"]}, files=[("images", ("a", _bomb(20_000)))]
    )
    assert response.status_code == 400 and peak_mib() - before < 100


def test_after_all_of_that_every_model_still_answers_in_the_process_it_began_in(server: Server) -> None:
    assert server.metric("medcompile_worker_restarts_total") == 0
    for url, body in good.items():
        if url != "/v1/match":
            assert server.post(url, body).status_code == 200, url


def test_what_was_read_of_the_schema_covers_every_route(api: Any) -> None:
    paths: Callable[[], Any] = api.raw_schema["paths"].keys
    assert set(good) <= set(paths())
